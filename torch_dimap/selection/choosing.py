"""How many of each weight's candidates are among the lowest of all."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

from torch_dimap.selection.exact import exact_score, share_exactly
from torch_dimap.selection.runs import Runs


def slack_of(found: Sequence[Runs]) -> float:
    """Return by how much the binary logarithm of a score of any of them may be wrong."""
    # Twice the error of a score: that of its energy, and of logarithms of up to 2^12.
    return 3 * max(runs.error for runs in found) + 2.0**-37


class Choice(NamedTuple):
    """How many candidates of each weight of a group are surely among the lowest of all."""

    found: Sequence[Runs]
    sure: list[int]
    open_: list[int]  # of how many more the scores cannot be told apart
    missing: int  # how many of the open ones go

    def unsettled(self) -> dict[int, float]:
        """Return for each weight the magnitude above which its exact energy must be known."""
        if sum(n > 0 for n in self.open_) <= 1 or self.missing in (0, sum(self.open_)):
            return {}
        return {i: _magnitude(self.found[i], self.sure[i] + n)
                for i, n in enumerate(self.open_) if n}  # fmt: skip

    def settle(self, energies: dict[int, Fraction]) -> list[int]:
        """Say how many candidates of each weight go, from the energies that it asked for."""
        if energies:
            more = share_exactly(self.found, self.sure, self.open_, self.missing, energies)
        elif self.missing == sum(self.open_):
            more = self.open_
        else:
            more = [self.missing if n else 0 for n in self.open_]
        return [n + settled for n, settled in zip(self.sure, more)]


def choose(found: Sequence[Runs], count: int) -> Choice:
    """Choose the ``count`` lowest of all candidates, as far as float64 can tell them apart."""
    slack = slack_of(found)
    low, high = _threshold(found, count, slack)
    # Scores outside of this window are surely on their side of the exact threshold.
    sure = [runs.going(low - slack) if low > -math.inf else 0 for runs in found]
    open_ = [runs.going(high + slack) - n for runs, n in zip(found, sure)]
    return Choice(found, sure, open_, count - sum(sure))


def highest(found: Sequence[Runs], going: Sequence[int]) -> dict[int, float]:
    """Return which weights may hold the highest score that goes, and its magnitude in each."""
    slack = slack_of(found)
    scores = {i: runs.score_of(n) for i, (runs, n) in enumerate(zip(found, going)) if n}
    top = max(scores.values(), default=-math.inf)
    if top == -math.inf:  # zeros only
        return {}
    return {i: _magnitude(found[i], going[i]) for i, x in scores.items() if x >= top - 2 * slack}


def threshold_of(
    found: Sequence[Runs], going: Sequence[int], energies: dict[int, Fraction]
) -> float:
    """Return the highest score that goes, from the energies above each that may be it."""
    return max((exact_score(found[i], going[i], energy) for i, energy in energies.items()),
               default=0.0)  # fmt: skip


def _magnitude(runs: Runs, n: int) -> float:
    """Return the magnitude of the n-th lowest candidate, from 1."""
    return float(runs.magnitude[runs.run_of(n)[0]])


def _threshold(found: Sequence[Runs], count: int, precision: float) -> tuple[float, float]:
    """Return between which scores the ``count``-th lowest lies, as binary logarithms."""
    if sum(runs.going(-math.inf) for runs in found) >= count:
        return -math.inf, -math.inf
    low, high = -1.0, 1.0
    while sum(lows := [runs.going(low) for runs in found]) >= count:
        low, high = 2 * low, low
    highs = [runs.going(high) for runs in found]
    while high - low > precision:
        middle = (low + high) / 2
        going = [
            runs.going(middle) if least < most else least
            for runs, least, most in zip(found, lows, highs)
        ]
        if sum(going) >= count:
            high, highs = middle, going
        else:
            low, lows = middle, going
    return low, high

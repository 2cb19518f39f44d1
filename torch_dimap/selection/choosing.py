"""How many of each weight's candidates are among the lowest of all."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch_dimap.selection.exact import share_exactly
from torch_dimap.selection.reading import FlatWeight
from torch_dimap.selection.runs import Runs


def choose(weights: Sequence[FlatWeight], found: Sequence[Runs], count: int) -> list[int]:
    """Say how many candidates of each weight are among the ``count`` lowest of all."""
    # Twice the error of a score: that of its energy, and of logarithms of up to 2^12.
    slack = 3 * max(runs.error for runs in found) + 2.0**-37
    low, high = _threshold(found, count, slack)
    # Scores outside of this window are surely on their side of the exact threshold.
    sure = [runs.going(low - slack) if low > -math.inf else 0 for runs in found]
    open_ = [runs.going(high + slack) - n for runs, n in zip(found, sure)]
    missing = count - sum(sure)
    if sum(n > 0 for n in open_) == 1:
        settled = [missing if n else 0 for n in open_]
    else:
        settled = share_exactly(weights, found, sure, open_, missing)
    return [n + more for n, more in zip(sure, settled)]


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

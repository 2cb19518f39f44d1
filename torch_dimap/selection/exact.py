"""Scores that float64 cannot tell apart, compared in rational arithmetic."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor

from torch_dimap.selection.reading import Blocks, Scratch, magnitude_of
from torch_dimap.selection.runs import Runs

BAND = 256  # binary orders of magnitude whose squares float64 holds together
IN_CACHE = 1 << 16  # entries that are summed together: fewer bits for their number, too
SPLIT = 2.0**27 + 1  # Dekker's: what splits 53 bits into twice 26


def share_exactly(
    found: Sequence[Runs],
    sure: Sequence[int],
    open_: Sequence[int],
    count: int,
    energies: Mapping[int, Fraction],
) -> list[int]:
    """Share ``count`` out among the weights of a group, lowest scores first.

    Args:
        found: the candidates of each weight.
        sure: how many of these, the lowest, go anyway.
        open_: how many of the next ones there is to choose from.
        count: how many of the latter go.
        energies: the exact energy above the highest of these, for each weight with any.
    """
    ranks = {i: _Reciprocals(found[i], sure[i] + n, energies[i]) for i, n in enumerate(open_) if n}

    def removal(i: int, n: int) -> tuple:
        """Return what sorts the open candidates of all weights, each the n-th of its own."""
        return -ranks[i].of(sure[i] + n + 1), -i, n

    # All below the lower numbers go, none from the higher ones on.
    lows, highs = dict.fromkeys(ranks, 0), {i: open_[i] for i in ranks}
    while sum(lows.values()) < count:
        between = sorted(
            (*removal(i, (lows[i] + highs[i] - 1) // 2), highs[i] - lows[i])
            for i in ranks
            if lows[i] < highs[i]
        )
        # The pivot is a median of medians: a quarter of all lies on either side of it.
        sizes = np.cumsum([size for *_, size in between])
        pivot = between[int(np.searchsorted(sizes, sizes[-1] / 2))][:3]
        going = {
            i: bisect_right(range(highs[i]), pivot, lows[i], key=lambda n: removal(i, n))
            for i in ranks
        }
        if sum(going.values()) <= count:
            lows = going
        else:
            highs = going
    return [lows.get(i, 0) for i in range(len(found))]


def exact_score(runs: Runs, n: int, energy: Fraction) -> float:
    """Return the score of the n-th lowest candidate, from 1, rounded once.

    Args:
        runs: the candidates of a weight.
        n: which of them.
        energy: the exact energy above its magnitude.
    """
    reciprocal = _Reciprocals(runs, n, energy).of(n)
    return 0.0 if reciprocal == math.inf else float(1 / Fraction(reciprocal))


class _Reciprocals:
    """One over the exact scores of a weight's candidates, which is what they add up to."""

    def __init__(self, runs: Runs, entries: int, energy: Fraction) -> None:
        """Prepare for the ``entries`` lowest candidates, with the energy above the last."""
        self.runs = runs
        run, _, _ = runs.run_of(entries)
        last = int(np.searchsorted(runs.magnitude, runs.magnitude[run], "right")) - 1
        self.energies = {last: energy}  # above a run

    def of(self, n: int) -> Fraction | float:
        """Return one over the score of the n-th lowest, from 1."""
        run, before, length = self.runs.run_of(n)
        square = Fraction(float(self.runs.magnitude[run])) ** 2
        return self._energy(run) / square + (before + length - n + 1) if square else math.inf

    def _energy(self, run: int) -> Fraction:
        magnitude, ends = self.runs.magnitude, self.runs.ends
        known = min(place for place in self.energies if place >= run)
        values = magnitude[run + 1 : known + 1]
        if ends is None:
            more = sum_of_squares(values)
        else:
            pairs = zip(values.tolist(), np.diff(ends[run : known + 1]).tolist())
            more = sum((n * Fraction(value) ** 2 for value, n in pairs), Fraction(0))
        self.energies[run] = self.energies[known] + more
        return self.energies[run]


def exact_energy(blocks: Blocks, above: float) -> Fraction:
    """Sum the unscaled squares of all magnitudes greater than ``above``, without rounding."""
    energy, scratch = Fraction(0), Scratch()
    for values, chooseable in blocks():
        inside = torch.threshold_(magnitude_of(values, scratch, chooseable), above, 0.0)
        if inside.dtype == torch.float64:
            energy += sum_of_squares(inside.cpu().numpy())
        else:
            for part in inside.split(IN_CACHE) if inside.is_cpu else [inside]:
                energy += _sum(scratch.take("wide", part, torch.float64).copy_(part).square_())
    return energy


def sum_of_squares(values: np.ndarray) -> Fraction:
    """Sum the squares of a float32 or float64 vector without rounding."""
    if values.dtype != np.float64:  # the squares need no more than 48 bits
        return _sum(torch.from_numpy(np.square(values, dtype=np.float64)))
    energy = Fraction(0)
    bands = np.frexp(values)[1] // BAND
    for band in range(bands.min(initial=0), bands.max(initial=0) + 1):
        part = np.ldexp(values[bands == band], -BAND * band)
        wide = part * SPLIT
        high = wide - (wide - part)
        low = part - high
        terms = (high * high, 2 * high * low, low * low)
        energy += sum(_sum(torch.from_numpy(x)) for x in terms) * Fraction(2) ** (2 * BAND * band)
    return energy


def _sum(values: Tensor) -> Fraction:
    """Sum a float64 vector without rounding, from the leading bits of all entries down.

    The vector is used up.
    """
    result = Fraction(0)
    while values.numel() and (largest := float(torch.stack(values.aminmax()).abs().max())):
        # Added to this, each entry is rounded to a multiple of one unit, of which the
        # sum of all is less than 2^53.
        unit = 2.0 ** (math.frexp(largest)[1] + values.numel().bit_length())
        leading = (values + unit).sub_(unit)
        result += Fraction(float(leading.sum()))
        values.sub_(leading)
    return result

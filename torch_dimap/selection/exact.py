"""Scores that float64 cannot tell apart, compared in rational arithmetic."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import torch

from torch_dimap.selection.reading import FlatWeight, greater, magnitude_of, pick
from torch_dimap.selection.runs import Runs

BAND = 256  # binary orders of magnitude whose squares float64 holds together
SPLIT = 2.0**27 + 1  # Dekker's: what splits 53 bits into twice 26


def share_exactly(
    weights: Sequence[FlatWeight],
    found: Sequence[Runs],
    sure: Sequence[int],
    open_: Sequence[int],
    count: int,
) -> list[int]:
    """Share ``count`` out among the weights, lowest scores first.

    Args:
        weights: those of one group.
        found: their candidates.
        sure: how many of these, the lowest, go anyway.
        open_: how many of the next ones there is to choose from.
        count: how many of the latter go.
    """
    ranks = {
        i: _Reciprocals(weights[i], found[i], sure[i] + n) for i, n in enumerate(open_) if n
    }

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
    return [lows.get(i, 0) for i in range(len(weights))]


class _Reciprocals:
    """One over the exact scores of a weight's candidates, which is what they add up to."""

    def __init__(self, weight: FlatWeight, runs: Runs, entries: int) -> None:
        """Prepare for the ``entries`` lowest candidates."""
        self.weight, self.runs = weight, runs
        self.highest = runs.run_of(entries)[0]
        self.energies: dict[int, Fraction] = {}  # above a run

    def of(self, n: int) -> Fraction | float:
        """Return one over the score of the n-th lowest, from 1."""
        run, before, length = self.runs.run_of(n)
        square = Fraction(float(self.runs.magnitude[run])) ** 2
        return self._energy(run) / square + (before + length - n + 1) if square else math.inf

    def _energy(self, run: int) -> Fraction:
        magnitude, ends = self.runs.magnitude, self.runs.ends
        if not self.energies:
            value = magnitude[self.highest]
            equal = int(np.searchsorted(magnitude, value, "right")) - 1  # the last of them
            self.energies[equal] = exact_energy(self.weight, float(value))
        known = min(place for place in self.energies if place >= run)
        values = magnitude[run + 1 : known + 1]
        if ends is None:
            more = sum_of_squares(values)
        else:
            pairs = zip(values.tolist(), np.diff(ends[run : known + 1]).tolist())
            more = sum((n * Fraction(value) ** 2 for value, n in pairs), Fraction(0))
        self.energies[run] = self.energies[known] + more
        return self.energies[run]


def exact_energy(weight: FlatWeight, above: float) -> Fraction:
    """Sum the unscaled squares of all magnitudes greater than ``above``, without rounding."""
    energy = Fraction(0)
    for block in weight.blocks():
        magnitude = magnitude_of(*block)
        inside = pick(magnitude, greater(magnitude, above))
        exact = inside if inside.dtype == torch.float64 else inside.float()
        energy += sum_of_squares(exact.cpu().numpy())
    return energy


def sum_of_squares(values: np.ndarray) -> Fraction:
    """Sum the squares of a float32 or float64 vector without rounding."""
    if values.dtype != np.float64:  # the squares need no more than 48 bits
        return _sum(np.square(values, dtype=np.float64))
    energy = Fraction(0)
    bands = np.frexp(values)[1] // BAND
    for band in range(bands.min(initial=0), bands.max(initial=0) + 1):
        part = np.ldexp(values[bands == band], -BAND * band)
        wide = part * SPLIT
        high = wide - (wide - part)
        low = part - high
        terms = (high * high, 2 * high * low, low * low)
        energy += sum(map(_sum, terms)) * Fraction(2) ** (2 * BAND * band)
    return energy


def _sum(values: np.ndarray) -> Fraction:
    """Sum a float64 vector without rounding, from the leading bits of all entries down."""
    result = Fraction(0)
    while len(values) and (largest := np.abs(values).max()):
        # Added to this, each entry is rounded to a multiple of one unit, of which the
        # sum of all is less than 2^53.
        unit = 2.0 ** (math.frexp(largest)[1] + len(values).bit_length())
        leading = (values + unit) - unit
        result += Fraction(leading.sum())
        values = values - leading
    return result

"""The entries inside a weight's bracket, each distinct magnitude once where many are equal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from torch_dimap.selection.brackets import Limits, logarithm_of
from torch_dimap.selection.cuts import Cut
from torch_dimap.selection.reading import (
    FlatWeight,
    ascending,
    search_between,
    total,
)

HELD = 1 << 18  # entries of a weight to hold before equal ones are sought among them
ROW = 1024  # squares that are added up one after the other


class Runs(NamedTuple):
    """The entries inside a weight's bracket, by magnitude, and how many lie beside it.

    The score of the k-th of a run, in row-major order and from 1, is
    ``square / (energy + (k - 1) * square)``, where square is that of the scaled magnitude.
    """

    magnitude: np.ndarray  # ascending
    ends: np.ndarray | None  # how many entries up to each; None: each stands for one
    energy: np.ndarray  # float64, scaled: of all entries down to the first of the run
    score: np.ndarray  # of the first of the run, the highest: its binary logarithm
    entries: int
    below: int
    above: int
    error: float  # a bound of the relative error of the energies

    def run_of(self, n: int) -> tuple[int, int, int]:
        """Return the run of the n-th lowest entry, from 1, how many precede it, and its length."""
        if self.ends is None:
            return n - 1, n - 1, 1
        run = int(np.searchsorted(self.ends, n))
        before = int(self.ends[run - 1]) if run else 0
        return run, before, int(self.ends[run]) - before

    def going(self, threshold: float) -> int:
        """Return how many entries score at most ``threshold``, a binary logarithm."""
        run = int(self.score.searchsorted(threshold, "right"))
        if self.ends is None:
            return run
        before = int(self.ends[run - 1]) if run else 0
        if run == len(self.score):
            return before
        # One over the score of the k-th entry is k - 1 more than that of the first.
        first = float(self.score[run])
        with np.errstate(over="ignore"):
            staying = np.expm1((first - threshold) * math.log(2)) * np.exp2(-first)
        length = int(self.ends[run]) - before
        return before + length - math.ceil(min(staying, length))

    def score_of(self, n: int) -> float:
        """Return the binary logarithm of the score of the n-th lowest entry, from 1."""
        run, before, length = self.run_of(n)
        first, earlier = float(self.score[run]), before + length - n
        return first - math.log2(1 + earlier * 2.0**first) if first > -math.inf else first


class Inside(NamedTuple):
    """What one reading finds between two magnitudes, and how much above them."""

    values: np.ndarray  # ascending
    counts: np.ndarray | None  # how often each occurs; None: each stands for one
    above: int
    energy: float  # above
    longest: int  # block that was read

    @property
    def entries(self) -> int:
        return len(self.values) if self.counts is None else int(self.counts.sum())


def find_runs(weight: FlatWeight, limits: Limits) -> Runs:
    """Read a weight for the entries between two magnitudes, and the energy above them."""
    return as_runs(weight, read_inside(weight, limits))


def read_inside(weight: FlatWeight, limits: Limits) -> Inside:
    """Read a weight, or the part of it that is here, between two magnitudes."""
    above, energies, collected, longest = [], [], _Inside(), 0
    for found in search_between(weight, limits):
        above.append(found.above)
        energies.append(found.energy)
        collected.add(found.inside)
        longest = max(longest, found.read)
    return Inside(*collected.ascending(), int(total(above)), total(energies), longest)


def as_runs(weight: FlatWeight, inside: Inside, additions: int = 0) -> Runs:
    """Score what lies inside.

    Args:
        weight: the whole one.
        inside: what was found in all of it.
        additions: how many sums were added up to the energy above.
    """
    found, counts = inside.values, inside.counts
    square = np.square(found * weight.scale, dtype=float)
    energy = energy_of_first(square, counts)
    energy += inside.energy
    score = logarithm_of(found, energy, weight.scale)
    ends = None if counts is None else counts.cumsum()
    below = weight.chooseable - inside.entries - inside.above
    # A sum of n positive terms, in any order, errs by less than n units in the last place:
    # n is a block, or a row and the number of rows; the rest is square, quotient and joining.
    error = (inside.longest + ROW + 2 * len(found) // ROW + 16 + additions) * 2.0**-52
    return Runs(found, ends, energy, score, inside.entries, below, inside.above, error)


class _Inside:
    """Magnitudes collected, of which equal ones are merged where that halves them."""

    def __init__(self) -> None:
        self.loose: list[Tensor] = []
        self.held, self.limit = 0, HELD
        self.merged: tuple[np.ndarray, np.ndarray] | None = None  # ascending, and how many

    def add(self, magnitude: Tensor) -> None:
        self.loose.append(magnitude)
        self.held += magnitude.numel()
        if self.held > self.limit:
            values = ascending(torch.cat(self.loose))
            distinct, counts = distinct_of(values)
            if 2 * len(distinct) > len(values):
                self.loose = [torch.from_numpy(values).to(magnitude.device)]
            else:
                self._join(distinct, counts)
                self.loose, self.held = [], 0
            self.limit = 2 * max(HELD, self.held)

    def _join(self, distinct: np.ndarray, counts: np.ndarray) -> None:
        if self.merged is not None:
            distinct, counts = merge([self.merged, (distinct, counts)])
        self.merged = distinct, counts

    def ascending(self) -> tuple[np.ndarray, np.ndarray | None]:
        """Return the magnitudes, and how many entries each one stands for if not for one."""
        values = ascending(torch.cat(self.loose)) if self.loose else np.empty(0)
        if self.merged is None:
            return values, None
        self._join(*distinct_of(values))
        return self.merged


def merge(found: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Join distinct magnitudes from several places, and how often each occurs."""
    values, counts = (np.concatenate(x) for x in zip(*found))
    distinct, place = np.unique(values, return_inverse=True)
    return distinct, np.bincount(place, counts, len(distinct)).astype(np.int64)


def distinct_of(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the distinct ones of sorted values, and how often each occurs."""
    starts = np.flatnonzero(np.append(True, values[1:] != values[:-1])[: len(values)])
    return values[starts], np.diff(starts, append=len(values))


def energy_of_first(square: np.ndarray, counts: np.ndarray | None) -> np.ndarray:
    """Return for each run the sum of all squares from the largest down to its first entry."""
    if counts is None:
        return _running_sum(square[::-1])[::-1].copy()
    rest_and_first = np.stack([square * (counts - 1), square], axis=1)
    return _running_sum(rest_and_first.ravel()[::-1])[::2][::-1].copy()


def _running_sum(values: np.ndarray) -> np.ndarray:
    """Return ``cumsum(values)`` in rows: no entry goes through more than a few thousand sums."""
    sums = np.zeros(-(-len(values) // ROW) * ROW)
    sums[: len(values)] = values
    rows = sums.reshape(-1, ROW)
    np.cumsum(rows, axis=1, out=rows)
    rows[1:] += rows[:-1, -1].cumsum()[:, None]
    return sums[: len(values)]


def cut_runs(weight: FlatWeight, runs: Runs, going: int) -> Cut:
    """Cut a weight so that its ``going`` lowest candidates, and all below, go."""
    kept = weight.chooseable - runs.below - going
    if going == 0:
        return Cut(-1.0, 0, kept)
    run, before, length = runs.run_of(going)
    magnitude = float(runs.magnitude[run])
    earlier = before + length - going
    if runs.ends is None:
        earlier = int(np.searchsorted(runs.magnitude, magnitude, "right")) - going
    return Cut(magnitude, earlier, kept)

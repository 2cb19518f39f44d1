"""Where the cut of each weight is to be expected, guessed from a sample of every weight.

Scores are handled as their binary logarithms here: those of float64 entries can be smaller
than any float64. Zeros have minus infinity.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch

from torch_dimap.selection.reading import FlatWeight, ascending

SAMPLE = 1 << 14  # entries of a weight from which its bracket is guessed
MARGIN = 3.0  # reach of a bracket, in standard deviations of a sampled rank
PRECISION = 1e-3  # of a guess, far less than a bracket
EVERYTHING = (-1.0, math.inf)  # the bracket that holds all that may go

Limits = tuple[float, float]  # magnitudes: from above the one, up to the other


class Sample(NamedTuple):
    """Evenly spread entries of one weight, or of a bracket of it, ascending."""

    magnitude: np.ndarray
    score: np.ndarray  # what Eq. 10 is expected to give them in the whole weight
    entries: float  # how many entries of the weight each one stands for
    below: int = 0  # how many lie under the bracket
    limits: Limits = EVERYTHING


def take_sample(weight: FlatWeight, wanted: int) -> Sample:
    """Pick entries all over a weight, about ``wanted`` of them, and estimate their scores."""
    return sample_of(weight, sampled(weight, wanted))


def sampled(weight: FlatWeight, wanted: int) -> np.ndarray:
    """Return the magnitudes of about ``wanted`` entries of a weight, or of its part here."""
    step = max(1, weight.size // wanted)
    while math.gcd(step, max(1, weight.size)) > 1:  # else it might see a few columns only
        step += 1
    position, found = 0, [torch.empty(0)]
    for values, chooseable in weight.blocks():
        part = slice(-position % step, None, step)
        magnitude = values[part].abs()
        found.append(magnitude if chooseable is None else magnitude[chooseable[part]])
        position += values.numel()
    return ascending(torch.cat(found[1:] or found))


def sample_of(weight: FlatWeight, magnitude: np.ndarray) -> Sample:
    """Estimate the scores of magnitudes, in ascending order, picked all over a weight."""
    magnitude = magnitude.astype(float)
    entries = weight.chooseable / max(1, len(magnitude))
    square = np.square(magnitude * weight.scale)
    # A sample tells well what the small entries hold together, and badly what the
    # large ones do: their energy is what the small ones leave of the total.
    energy = weight.energy - entries * (np.cumsum(square) - square)
    least = entries * square * np.arange(len(square), 0, -1)
    return Sample(magnitude, expected_scores(weight, magnitude, np.maximum(energy, least)), entries)


def expected_scores(weight: FlatWeight, magnitude: np.ndarray, energy: np.ndarray) -> np.ndarray:
    """Return the logarithms of the scores of sampled magnitudes, ascending like these."""
    return np.maximum.accumulate(logarithm_of(magnitude, energy, weight.scale))


def logarithm_of(magnitude: np.ndarray, energy: np.ndarray, scale: float) -> np.ndarray:
    """Return the binary logarithms of scores: squares of scaled magnitudes over energies."""
    with np.errstate(divide="ignore"):  # of zeros
        score = 2 * (np.log2(magnitude, dtype=float) + np.log2(scale))
    score -= np.log2(np.maximum(energy, np.finfo(float).tiny))
    return score


def guess_threshold(samples: list[Sample], count: int) -> float:
    """Return the score under which about ``count`` entries are expected."""

    def expected(threshold: float) -> float:
        return sum(
            s.below + s.entries * float(s.score.searchsorted(threshold, "right"))
            for s in samples
        )

    if expected(-math.inf) >= count:
        return -math.inf
    low, high = -1.0, 0.0
    while expected(low) >= count:
        low, high = 2 * low, low
    while high - low > PRECISION:
        middle = (low + high) / 2
        low, high = (low, middle) if expected(middle) >= count else (middle, high)
    return high


def bracket(sample: Sample, threshold: float, margin: float) -> Limits:
    """Return the magnitudes between which the cut is expected."""
    size = len(sample.score)
    lowest, highest = sample.limits
    rank = int(np.searchsorted(sample.score, threshold))
    reach = math.ceil(margin * (math.sqrt(rank * (size - rank) / max(1, size)) + 4))
    low = sample.magnitude[rank - reach] if rank >= reach else lowest
    high = sample.magnitude[rank + reach] if rank + reach < size else highest
    if size:  # where entries tie, their neighbours too, or the cut would lie on the edge
        values, middle = sample.magnitude, sample.magnitude[min(rank, size - 1)]
        under = _under(values, _under(values, middle, lowest), lowest)
        place = int(np.searchsorted(values, middle, side="right"))
        low, high = min(low, under), max(high, values[place] if place < size else highest)
    return float(low), float(high)


def _under(values: np.ndarray, value: float, lowest: float) -> float:
    """Return the greatest of the values that is less than another."""
    place = int(np.searchsorted(values, value))
    return float(values[place - 1]) if place else lowest

"""Where the cut of each layer is to be expected, guessed from a sample of every layer."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch

from torch_dimap.selection.reading import (
    FlatLayer,
    count_true,
    energy_above,
    magnitude_of,
    pick,
    sort,
    total,
)

SAMPLE = 1 << 14  # entries of a layer from which its bracket is guessed
NARROW_SAMPLE = 1 << 11  # the same where memory is short
MARGIN = 4.0  # reach of a bracket, in standard deviations of a sampled rank


class Sample(NamedTuple):
    """Evenly spread non-zero entries of one layer, or of a bracket of it, ascending."""

    magnitude: np.ndarray
    score: np.ndarray  # what Eq. 10 is expected to give them in the whole layer
    entries: float  # how many entries of the layer each one stands for
    below: int = 0  # how many lie under the bracket
    low: float = 0.0
    high: float = math.inf


def take_sample(layer: FlatLayer, wanted: int) -> Sample:
    """Pick entries all over a layer, about ``wanted`` of them, and estimate their scores."""
    step = max(1, layer.size // wanted)
    while math.gcd(step, max(1, layer.size)) > 1:  # else it might see a few columns only
        step += 1
    position, spread = 0, torch.empty(0)
    for weight, chooseable in layer.blocks():
        if not position:
            spread = weight.new_empty(-(-layer.size // step))
        part = slice(-position % step, None, step)
        found = magnitude_of(weight[part], None if chooseable is None else chooseable[part])
        first = -(-position // step)
        spread[first : first + found.numel()] = found
        position += weight.numel()
    magnitude = sort(spread[spread > 0].cpu()).double().numpy()
    entries = layer.nonzeros / max(1, len(magnitude))
    square = np.square(magnitude * layer.scale.item())
    # A sample tells well what the small entries hold together, and badly what the
    # large ones do: their energy is what the small ones leave of the total.
    energy = layer.energy - entries * (np.cumsum(square) - square)
    least = entries * square * np.arange(len(square), 0, -1)
    score = square / np.maximum(energy, np.maximum(least, np.finfo(float).tiny))
    return Sample(magnitude, np.maximum.accumulate(score), entries)


def guess_threshold(samples: list[Sample], count: int) -> float:
    """Return the score under which about ``count`` entries are expected."""
    score = np.concatenate([s.score for s in samples])
    entries = np.repeat([s.entries for s in samples], [len(s.score) for s in samples])
    order = np.argsort(score)
    inside = count - sum(s.below for s in samples)
    rank = int(np.searchsorted(np.cumsum(entries[order]), inside))
    return float(score[order[min(rank, len(order) - 1)]]) if len(order) else 0.0


def bracket(sample: Sample, threshold: float, margin: float) -> tuple[float, float]:
    """Return the magnitudes (from above, up to) between which the cut is expected."""
    size = len(sample.score)
    rank = int(np.searchsorted(sample.score, threshold))
    reach = math.ceil(margin * (math.sqrt(rank * (size - rank) / max(1, size)) + 4))
    low = sample.magnitude[rank - reach] if rank >= reach else sample.low
    high = sample.magnitude[rank + reach] if rank + reach < size else sample.high
    if size:  # where entries tie, their neighbours too, or the cut would lie on the edge
        values, middle = sample.magnitude, sample.magnitude[min(rank, size - 1)]
        under = _under(values, _under(values, middle, sample.low), sample.low)
        place = int(np.searchsorted(values, middle, side="right"))
        low, high = min(low, under), max(high, values[place] if place < size else sample.high)
    return float(low), float(high)


def _under(values: np.ndarray, value: float, lowest: float) -> float:
    """Return the greatest of the values that is less than another."""
    place = int(np.searchsorted(values, value))
    return float(values[place - 1]) if place else lowest


def narrow(layer: FlatLayer, sample: Sample, limits: tuple[float, float]) -> Sample:
    """Sample a layer again, now only between two magnitudes; around them nothing is guessed."""
    low, high = limits
    thin = max(1, int(expected(sample, limits)) // NARROW_SAMPLE)
    values, above, energies, seen = [], [], [], 0
    for block in layer.blocks():
        magnitude = magnitude_of(*block)
        over = magnitude > high
        above.append(count_true(over))
        energies.append(energy_above(magnitude, high, layer.scale))
        inside = pick(magnitude, (magnitude > low).logical_xor_(over))
        values += inside[-seen % thin :: thin].tolist()
        seen += inside.numel()
    ascending = np.sort(np.array(values, dtype=float))
    entries = seen / max(1, len(ascending))
    square = np.square(ascending * layer.scale.item())
    energy = total(energies) + entries * np.cumsum(square[::-1])[::-1]
    score = square / np.maximum(energy, np.finfo(float).tiny)
    below = layer.nonzeros - int(total(above)) - seen
    return Sample(ascending, np.maximum.accumulate(score), entries, below, low, high)


def expected(sample: Sample, limits: tuple[float, float]) -> float:
    """Return how many entries of the layer are expected in ``(low, high]``."""
    low, high = np.searchsorted(sample.magnitude, limits, side="right")
    return float(high - low) * sample.entries

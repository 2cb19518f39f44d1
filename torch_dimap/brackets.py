"""Where the cut of each layer is to be expected, guessed from a sample of every layer."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch

from torch_dimap.reading import FlatLayer, magnitude_of, sort

SAMPLE = 1 << 14  # entries of a layer from which its bracket is guessed
MARGIN = 4.0  # reach of a bracket, in standard deviations of a sampled rank


class Sample(NamedTuple):
    """Evenly spread non-zero entries of one layer, ascending."""

    magnitude: np.ndarray
    score: np.ndarray  # what Eq. 10 is expected to give them in the whole layer
    entries: float  # how many entries of the layer each one stands for


def take_sample(layer: FlatLayer) -> Sample:
    """Pick entries all over a layer and estimate their scores."""
    step = max(1, layer.size // SAMPLE)
    while math.gcd(step, max(1, layer.size)) > 1:  # else it might see a few columns only
        step += 1
    position, parts = 0, [torch.empty(0)]
    for weight, chooseable in layer.blocks():
        part = slice(-position % step, None, step)
        position += weight.numel()
        found = magnitude_of(weight[part], None if chooseable is None else chooseable[part])
        parts.append(found[found > 0].cpu())
    magnitude = sort(torch.cat(parts)).double().numpy()
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
    rank = int(np.searchsorted(np.cumsum(entries[order]), count))
    return float(score[order[min(rank, len(order) - 1)]]) if len(order) else 0.0


def bracket(sample: Sample, threshold: float, margin: float) -> tuple[float, float]:
    """Return the magnitudes (from above, up to) between which the cut is expected."""
    size = len(sample.score)
    rank = int(np.searchsorted(sample.score, threshold))
    reach = math.ceil(margin * (math.sqrt(rank * (size - rank) / max(1, size)) + 4))
    low = sample.magnitude[rank - reach] if rank >= reach else 0.0
    high = sample.magnitude[rank + reach] if rank + reach < size else math.inf
    return float(low), float(high)

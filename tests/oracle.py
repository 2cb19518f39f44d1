"""The method written down slowly, straight from Eq. 10, to test the fast path against."""

from __future__ import annotations

from fractions import Fraction

import torch
from torch import Tensor

import torch_dimap


def select_exactly(
    weights: list[Tensor], count: int, masks: list[Tensor | None] | None = None
) -> tuple[list[Tensor], float]:
    """Score every entry by a double loop in rational arithmetic; remove the lowest."""
    scored = []
    keeps = []
    for layer, weight in enumerate(weights):
        mask = None if masks is None else masks[layer]
        keep = torch.ones(weight.numel(), dtype=torch.bool) if mask is None else mask.flatten() != 0
        keeps.append(keep.clone())
        square = [Fraction(value) ** 2 for value in weight.flatten().tolist()]
        ranked = sorted(keep.nonzero().flatten().tolist(), key=lambda i: (-square[i], i))
        for rank, i in enumerate(ranked):
            energy = sum(square[j] for j in ranked[: rank + 1])
            score = square[i] / energy if energy else Fraction(0)
            scored.append((score, -layer, -rank, i))
    chosen = sorted(scored)[:count]
    for _, layer, _, i in chosen:
        keeps[-layer][i] = False
    threshold = float(chosen[-1][0]) if chosen else 0.0
    return [keep.view(w.shape) for keep, w in zip(keeps, weights)], threshold


def select_by_sorting(
    weights: list[Tensor], count: int, masks: list[Tensor | None] | None = None
) -> tuple[list[Tensor], float]:
    """Sort the float64 scores of all layers; for sizes beyond rational arithmetic."""
    keeps = [
        torch.ones(w.numel(), dtype=torch.bool) if m is None else m.flatten() != 0
        for w, m in zip(weights, masks or [None] * len(weights))
    ]
    keys = []
    for layer, (weight, keep) in enumerate(zip(weights, keeps)):
        flat = weight.flatten()[keep]
        score = torch_dimap.dimap_scores(flat)
        index = keep.nonzero().flatten()
        order = flat.double().abs().argsort(descending=True, stable=True)
        keys.append((score[order], torch.full_like(index, layer), index[order]))
    score, layer, index = (torch.cat(parts) for parts in zip(*keys))
    # Layer by layer from the largest entry down: reversed, ties are in order of removal.
    removal = score.flip(0).argsort(stable=True)[:count]
    for i, keep in enumerate(keeps):
        chosen = removal[layer.flip(0)[removal] == i]
        keep[index.flip(0)[chosen]] = False
    threshold = float(score.flip(0)[removal[-1]]) if count else 0.0
    return [keep.view(w.shape) for keep, w in zip(keeps, weights)], threshold

"""Penalties on class masks: what else their training makes small.

The method's published abstract names none of them. Others' reimplementations cite two, one
for sparsity and one for smoothness, and differ in both; ``docs/xpruner.md`` says who does what.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

Penalty = Callable[[Sequence[Tensor]], Tensor]


def squares(masks: Sequence[Tensor]) -> Tensor:
    """Return the sum of all squares: sparsity, each entry for itself."""
    return _total(torch.linalg.vector_norm(mask).square() for mask in masks)


def norms(masks: Sequence[Tensor]) -> Tensor:
    """Return the sum of the layers' norms: sparsity, a layer as a whole."""
    return _total(torch.linalg.vector_norm(mask) for mask in masks)


def unit_laplacian(masks: Sequence[Tensor]) -> Tensor:
    """Return the absolute second differences between neighbouring units.

    Units have no order of their own, so what this smooths depends on how they happen to lie.
    """
    return _total(mask.diff(n=2, dim=1).abs().sum() for mask in masks if mask.shape[1] > 2)


def class_difference(masks: Sequence[Tensor]) -> Tensor:
    """Return the absolute differences between neighbouring classes, which lie as arbitrarily."""
    return _total(mask.diff(dim=0).abs().sum() for mask in masks)


def class_mean(masks: Sequence[Tensor]) -> Tensor:
    """Return the squared distances of the classes from their mean; it knows no order."""
    return _total((mask - mask.mean(0)).square().sum() for mask in masks)


PENALTIES: dict[str, Penalty] = {
    "squares": squares,
    "norms": norms,
    "unit_laplacian": unit_laplacian,
    "class_difference": class_difference,
    "class_mean": class_mean,
}


def _total(values: Iterable[Tensor]) -> Tensor:
    found = list(values)
    return torch.stack(found).sum() if found else torch.zeros(())

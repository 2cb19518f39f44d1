"""How much a unit can give to its layer, by its weights alone."""

from __future__ import annotations

import torch
from torch import Tensor

from torch_dimap.units.description import Part, UnitLayer


def unit_magnitudes(layer: UnitLayer) -> Tensor:
    """Return, for each unit, the norm of what makes it times the norm of what reads it.

    That is the rows that make a unit, with their biases, and the columns that read it. A
    product stays what it is where the rows are scaled and the columns scaled back. What is
    masked counts as zero.

    Returns:
        float64, of one entry per unit.

    Example:
        >>> import timm, torch_dimap
        >>> vit = timm.create_model("vit_tiny_patch16_224", depth=1)
        >>> unit_magnitudes(torch_dimap.group_units(vit)["heads"][0]).shape
        torch.Size([3])
    """
    makes = [part for part in layer.parts if part.masked and part != layer.read]
    return _norms(makes, layer) * _norms([layer.read], layer)


def _norms(parts: list[Part], layer: UnitLayer) -> Tensor:
    """Return the Euclidean norm of all that several parts hold of each unit."""
    squares = torch.zeros(layer.units, dtype=torch.float64, device=layer.read.tensor.device)
    for part in parts:
        view, others = part.by_unit(part.values)
        norm = torch.linalg.vector_norm(view, dim=others, dtype=torch.float64)
        squares += norm.square().to(squares.device)
    return squares.sqrt()

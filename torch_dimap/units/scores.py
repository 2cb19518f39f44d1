"""How much a unit matters to its layer, by its weights alone."""

from __future__ import annotations

import torch
from torch import Tensor

from torch_dimap.units.description import UnitLayer


def unit_norms(layer: UnitLayer) -> Tensor:
    """Return the Euclidean norm of all that each unit of a layer holds, float64.

    A unit's entries are the rows that make it, with their biases, and the columns that
    read it; what is masked counts as zero.
    """
    squares = torch.zeros(layer.units, dtype=torch.float64, device=layer.read.tensor.device)
    for part in (part for part in layer.parts if part.masked):
        view, others = part.by_unit(part.values)
        norm = torch.linalg.vector_norm(view, dim=others, dtype=torch.float64)
        squares += norm.square().to(squares.device)
    return squares.sqrt()

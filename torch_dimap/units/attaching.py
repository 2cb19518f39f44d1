"""Masks over whole units, put on all maskable parts of unit layers or on none."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.utils import prune

from torch_dimap.masking import (
    all_or_nothing,
    attach,
    check_values,
    find_layers,
    hold,
    known_readers,
)
from torch_dimap.units.description import UnitLayer


class WholeUnits(prune.BasePruningMethod):
    """Mask all slices of a tensor along ``dim`` that are not among those to keep.

    Args:
        keep: one flag per slice.
        dim: along which dimension the slices lie.
    """

    PRUNING_TYPE = "structured"

    def __init__(self, keep: Tensor, dim: int) -> None:
        self.keep = keep
        self.dim = dim

    def compute_mask(self, t: Tensor, default_mask: Tensor) -> Tensor:
        """Return ``default_mask`` with zeros in the slices that are not kept."""
        shape = [-1 if i == self.dim else 1 for i in range(default_mask.dim())]
        return default_mask * self.keep.view(shape).to(default_mask.dtype)


def mask_units(
    groups: Mapping[str, list[UnitLayer]], keeps: Mapping[str, list[Tensor]], caller: str
) -> None:
    """Put masks on all maskable parts of the layers, or on none if anything fails."""
    parts = {
        group: [
            (part, keep)
            for layer, keep in zip(layers, keeps[group])
            for part in layer.parts
            if part.masked
        ]
        for group, layers in groups.items()
    }
    found = find_layers(
        {group: [(part.module, part.name) for part, _ in held] for group, held in parts.items()},
        caller,
    )
    check_values(found, None, caller)
    plan = [
        (target, part, keep)
        for group, held in parts.items()
        for target, (part, keep) in zip(found[group], held)
    ]
    readers = known_readers(target.module for target, _, _ in plan)
    with all_or_nothing([*(target.module for target, _, _ in plan), *readers]):
        for target, part, keep in plan:
            method = WholeUnits(part.along(keep.to(target.parameter.device)), part.dim)
            before = target.mask
            if before is None:
                before = torch.ones_like(target.parameter, dtype=torch.bool)
            attach(target, method, method.compute_mask(target.parameter, before))
        for reader in readers:
            hold(reader)

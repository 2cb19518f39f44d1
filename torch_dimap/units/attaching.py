"""Masks over whole units, put on all maskable parts of unit layers or on none."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.utils import prune

from torch_dimap.masking import (
    Layer,
    all_or_nothing,
    attach,
    check_layer,
    check_values,
    hold,
    known_readers,
    refuse_sharded,
)
from torch_dimap.selection import check_finite
from torch_dimap.units.description import Part, UnitLayer


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


def maskable_parts(
    groups: Mapping[str, list[UnitLayer]], caller: str
) -> dict[str, list[tuple[Layer, Part, int]]]:
    """Check that all parts can be masked; return them with their layer's place in its group."""
    parts = {
        group: [
            (Layer(f"{unit.name} ({type(part.module).__name__}.{part.name})", *part[:2]), part, i)
            for i, unit in enumerate(units)
            for part in unit.parts
            if part.masked
        ]
        for group, units in groups.items()
    }
    layers = {group: [layer for layer, *_ in held] for group, held in parts.items()}
    for layer in (layer for group in layers.values() for layer in group):
        check_layer(layer, caller)
        refuse_sharded([(layer.label, layer.parameter)], caller)
        check_finite(layer.parameter, f"{caller}: {layer.label}")
    check_values(layers, None, caller)
    return parts


def mask_units(
    groups: Mapping[str, list[UnitLayer]], keeps: Mapping[str, list[Tensor]], caller: str
) -> None:
    """Put masks on all maskable parts of the layers, or on none if anything fails."""
    parts = maskable_parts(groups, caller)
    plan = [(layer, part, keeps[group][i]) for group in parts for layer, part, i in parts[group]]
    modules = [layer.module for layer, _, _ in plan]
    readers = known_readers(modules)
    with all_or_nothing([*modules, *readers]):
        for layer, part, keep in plan:
            orig, mask = layer.parameter, layer.mask
            before = torch.ones_like(orig, dtype=torch.bool) if mask is None else mask != 0
            method = WholeUnits(part.along(keep.to(orig.device)), part.dim)
            attach(layer, method, method.compute_mask(orig, before))
        for reader in readers:
            hold(reader)

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
)
from torch_dimap.selection import check_finite
from torch_dimap.sharding import (
    agree,
    is_sharded,
    layout_of,
    local_of,
    processes_of,
    rest_sharded,
)
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
    """Check that all parts can be masked; return them with their layer's place in its group.

    Of sharded ones all processes must make the call, and all raise if one of them does.
    """
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
    held = [(layer, part) for group in parts.values() for layer, part, _ in group]
    rest_sharded(part.module for _, part in held)

    def check() -> tuple[None, object]:
        for layer, _ in held:
            check_layer(layer, caller)
            check_finite(local_of(layer.parameter), f"{caller}: {layer.label}")
        return None, None

    agree(processes_of((part.tensor for _, part in held), caller), check, caller)
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
            own, mask = local_of(layer.parameter), layer.mask
            before = torch.ones_like(own, dtype=torch.bool) if mask is None else local_of(mask) != 0
            method = WholeUnits(_here(part.along(keep.to(own.device)), layer, part), part.dim)
            attach(layer, method, method.compute_mask(own, before))
        for reader in readers:
            hold(reader)


def _here(flags: Tensor, layer: Layer, part: Part) -> Tensor:
    """Return the flags of those slices of which this process holds something."""
    if not is_sharded(layer.parameter):
        return flags
    return flags[layout_of(layer.parameter, False, layer.label).slices[part.dim]]

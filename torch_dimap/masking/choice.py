"""The masks that DIMAP gives to groups of layers, whole or sharded over processes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from torch_dimap.masking.layers import Layer, count_unpruned
from torch_dimap.selection import (
    CPU_BLOCK,
    Held,
    blocks_of,
    find_cuts_together,
    mask_of,
    read_together,
    select,
    share_ties,
    threaded_map,
)
from torch_dimap.sharding import (
    Processes,
    is_sharded,
    layout_of,
    local_of,
    processes_of,
    spread,
)


class Chosen(NamedTuple):
    """What stays of the layers of a group."""

    masks: list[Tensor]  # True for what stays; of sharded layers the parts that are here
    emptied: list[bool]  # of which layers nothing stays
    threshold: float  # the highest score that goes


def left_of(layer: Layer, mask: Tensor) -> Tensor:
    """Return where a chosen mask leaves a weight that is not zero, laid out as the layer."""
    alive = mask & (local_of(layer.parameter) != 0)
    return spread(alive, layer.parameter) if is_sharded(layer.parameter) else alive


def is_empty(mask: Tensor) -> bool:
    """Say whether a mask of some entries lets none of them stay."""
    if mask.device.type == "cpu":  # NumPy stops at the first entry that stays, torch at none
        return bool(mask.numel()) and not mask.numpy().any()
    return bool(mask.numel()) and not bool(mask.any())


def unpruned_by_group(groups: Mapping[str, list[Layer]], caller: str) -> dict[str, int]:
    """Return how many entries of each group the masks keep."""
    counts = iter(count_unpruned([x for layers in groups.values() for x in layers], caller))
    return {group: sum(next(counts) for _ in layers) for group, layers in groups.items()}


def choose_masks(
    groups: Mapping[str, list[Layer]],
    values: Mapping[str, list[Tensor]],
    counts: Mapping[str, int],
    caller: str,
) -> dict[str, Chosen]:
    """Choose the lowest scores of each group.

    Args:
        groups: layers that have been checked.
        values: what to rank them by; of sharded ones the parts that are here.
        counts: how many entries of each group go.
        caller: the function that was called, for messages.
    """
    layers = [layer for group in counts for layer in groups[group]]
    processes = processes_of((layer.parameter for layer in layers), caller)
    if processes is not None:
        return _choose_together(groups, values, counts, caller, processes)
    chosen = {}
    for group, count in counts.items():
        names = [f"{caller}: {layer.label}" for layer in groups[group]]
        masks, threshold = select(
            values[group], count, [layer.mask for layer in groups[group]], names
        )
        chosen[group] = Chosen(masks, list(map(is_empty, masks)), threshold)
    return chosen


def _choose_together(
    groups: Mapping[str, list[Layer]],
    values: Mapping[str, list[Tensor]],
    counts: Mapping[str, int],
    caller: str,
    processes: Processes,
) -> dict[str, Chosen]:
    """Choose among weights of which each process holds a part."""
    layers = [layer for group in counts for layer in groups[group]]
    parts = [value for group in counts for value in values[group]]
    masks = [None if layer.mask is None else local_of(layer.mask) for layer in layers]
    names = [f"{caller}: {layer.label}" for layer in layers]
    first = processes.rank == 0
    layouts = [layout_of(x.parameter, first, name) for x, name in zip(layers, names)]
    on_cpu = all(part.device.type == "cpu" for part in parts)
    with threaded_map(sum(part.numel() > CPU_BLOCK for part in parts), on_cpu) as map_:
        held = [
            Held(blocks, layout, layout.counts)
            for blocks, layout in zip(map(blocks_of, parts, masks), layouts)
        ]
        counting = [x.blocks if x.counts else tuple for x in held]
        dtypes = [part.dtype for part in parts]
        weights = iter(read_together(counting, dtypes, names, processes, map_))
        results = find_cuts_together(
            [[next(weights) for _ in groups[group]] for group in counts],
            [[value.dtype for value in values[group]] for group in counts],
            list(counts.values()),
            processes,
            map_,
        )
        cuts = [cut for of_group, _ in results for cut in of_group]
        own = share_ties(cuts, held, processes)
        keeps = iter(list(map_(mask_of, parts, [x.blocks for x in held], own)))
    return {
        group: Chosen(
            [next(keeps) for _ in of_group],
            [not cut.kept and bool(layer.parameter.numel())
             for cut, layer in zip(of_group, groups[group])],
            threshold,
        )
        for group, (of_group, threshold) in zip(counts, results)
    }

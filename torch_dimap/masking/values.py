"""What layers are to be ranked by, their weights or scores that are given, checked in full."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from torch_dimap.masking.layers import Layer, Pair
from torch_dimap.masking.targets import SINGLE_GROUP, refuse_taken_names
from torch_dimap.selection import check_finite, check_rankable
from torch_dimap.sharding import (
    agree,
    laid_out,
    local_of,
    managed_names,
    processes_of,
    refuse_unlike_replicas,
)

Scores = Mapping[Pair, Tensor | None]


def check_values(
    groups: Mapping[str, list[Layer]], importance_scores: Scores | None, caller: str
) -> dict[str, list[Tensor]]:
    """Check that layers can be ranked.

    Returns:
        Group -> what to rank each layer by; of a sharded one the part that is here. Then all
        processes must make the call, and all raise if one of them does.
    """
    layers = [layer for of_group in groups.values() for layer in of_group]
    processes = processes_of((layer.parameter for layer in layers), caller)

    def check() -> tuple[dict[str, list[Tensor]], object]:
        values = _check_values(groups, importance_scores, caller)
        return values, _description(layers, importance_scores)

    values = agree(processes, check, caller)
    if processes is not None:
        names = [f"{caller}: {layer.label}" for layer in layers]
        parts = [part for of_group in values.values() for part in of_group]
        refuse_unlike_replicas([x.parameter for x in layers], parts, names, processes)
    return values


def _description(layers: list[Layer], scores: Scores | None) -> object:
    """Return what tells one call on layers from another, in any process.

    The same list in another order is another call: ``fully_shard`` knows an order of its own.
    """
    given = [None if scores is None else scores[x.module, x.name] for x in layers]
    order = {place: i for i, place in enumerate(managed_names(x.module for x in layers))}
    return [
        (
            x.label, tuple(x.parameter.shape), str(x.parameter.dtype), x.method is None,
            order.get((x.module, x.name if x.method is None else f"{x.name}_orig")),
            own is None or str(own.dtype),
        )
        for x, own in zip(layers, given)
    ]  # fmt: skip


def _check_values(
    groups: Mapping[str, list[Layer]], importance_scores: Scores | None, caller: str
) -> dict[str, list[Tensor]]:
    if importance_scores is not None and not isinstance(importance_scores, Mapping):
        raise TypeError(
            f"{caller}: importance_scores must be a mapping (module, name) -> tensor, "
            f"found {type(importance_scores).__name__}."
        )
    if not groups:
        raise ValueError(f"{caller}: parameters is empty, found no group and no pair to prune.")
    for group, layers in groups.items():
        if not sum(layer.parameter.numel() for layer in layers):
            where = "parameters" if list(groups) == [SINGLE_GROUP] else f"parameters[{group!r}]"
            raise ValueError(f"{caller}: {where} holds no weights: list some, or leave it out.")
    values = {
        group: [_values(layer, importance_scores, caller) for layer in layers]
        for group, layers in groups.items()
    }
    known = {(layer.module, layer.name) for layers in groups.values() for layer in layers}
    surplus = [pair for pair in importance_scores or () if pair not in known]
    if surplus:
        raise ValueError(
            f"{caller}: importance_scores must be for pairs listed in parameters, found "
            f"{len(surplus)} more: leave them out, or list their pairs."
        )
    return values


def _values(layer: Layer, scores: Scores | None, caller: str) -> Tensor:
    label, module, name = layer
    refuse_taken_names(layer, caller)
    parameter, mask = layer.parameter, layer.mask
    here = local_of(parameter)
    # Where the weights themselves are ranked, the first reading of them finds what is not finite.
    (check_rankable if scores is None else check_finite)(here, f"{caller}: {label}")
    if mask is not None and mask.dtype != torch.bool:
        own = local_of(mask)
        if not ((own == 0) | (own == 1)).all():
            raise ValueError(f"{caller}: the mask of {label} must hold 0 and 1 only: binarize it.")
    if scores is None:
        return here
    if (module, name) not in scores:
        raise ValueError(
            f"{caller}: importance_scores has none for {label}: "
            "give every pair in parameters a tensor, or None where its weights are to count."
        )
    values = scores[module, name]
    if values is None:
        return here
    check_rankable(values, f"{caller}: importance_scores of {label}")
    if values.shape != parameter.shape:
        raise ValueError(
            f"{caller}: importance_scores of {label} must have the shape "
            f"{tuple(parameter.shape)}, found {tuple(values.shape)}."
        )
    own = local_of(laid_out(values, parameter))
    check_finite(own, f"{caller}: importance_scores of {label}")
    return own.to(here.device)

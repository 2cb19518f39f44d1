"""Whole units masked, heads ranked among heads and neurons among neurons."""

from __future__ import annotations

import numbers
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from torch_dimap.masking import (
    SINGLE_GROUP,
    DimapUnstructured,
    all_or_nothing,
    amounts_by_group,
    attach,
    check_values,
    count_to_prune,
    find_layers,
    hold,
    known_readers,
)
from torch_dimap.selection import check_finite, dimap_scores
from torch_dimap.units.choice import LayerScores, choose_units
from torch_dimap.units.description import NEURONS, UnitLayer
from torch_dimap.units.scores import unit_norms

CALL = "global_module_aware_structured()"

# What makes units of several layers comparable, from one number for each unit of a layer.
RANKINGS: dict[Any, Callable[[Tensor], Tensor]] = {
    DimapUnstructured: dimap_scores,
    prune.L1Unstructured: torch.abs,
    prune.RandomUnstructured: torch.rand_like,
}


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


class KeptUnits(NamedTuple):
    """What a call leaves of a group of unit layers."""

    threshold: float  # the highest score that went; 0.0 if nothing did
    pruned: int  # how many units went in this call
    kept: dict[str, int]  # unit layer's name -> units that are left


def global_module_aware_structured(
    units: Mapping[str, Iterable[UnitLayer]] | Iterable[UnitLayer],
    amount: Any,
    importance_scores: Mapping[Any, Tensor] | None = None,
    minimum: int = 1,
    multiple: int = 16,
    pruning_method: Any = DimapUnstructured,
) -> dict[str, KeptUnits]:
    """Mask whole attention heads and neurons in place, ranking each group for itself.

    What :func:`torch_dimap.global_module_aware_unstructured` is for single weights. Every
    weight and bias of a unit gets torch's own mask, as described there; weights that
    were masked before stay masked. :func:`remove_units` then cuts the units out.

    By default a unit's score comes from its weights alone: ``d`` being the norm of all
    that it holds, its score is ``d**2`` over the sum of all ``d**2`` of its layer that are
    not smaller, Eq. 10 of the DIMAP paper with units in place of weights.

    Whatever fails, the model is left as it was.

    Args:
        units: group -> unit layers, as :func:`group_units` returns them; or unit layers
            alone, which form one group.
        amount: of the units that no mask has taken yet: float, the fraction of every
            group; int, the total over all groups, shared out in proportion to their
            numbers; dict, group -> float or int. ``round(amount * unmasked)`` of a group
            go; of neurons as many as comes nearest to it in whole multiples.
        importance_scores: unit layer, or its name, -> tensor of one number per unit that
            takes the place of ``d``, for all layers or none; its magnitude counts, and
            larger means keep.
        minimum: how many units stay in each layer at the least. With 0 a layer may lose
            all: what is left of its branch is the bias of its projection.
        multiple: neurons are kept in multiples of this, for which matrix products are
            made; 1 keeps any number. A layer that has fewer loses them one by one, one
            that loses none keeps its number, and heads go one by one.
        pruning_method: how units of several layers compare: ``DimapUnstructured`` as
            above; ``prune.L1Unstructured``, by ``d`` itself; ``prune.RandomUnstructured``.

    Returns:
        Group -> :class:`KeptUnits`: the threshold, how many units went, and how many each
        layer keeps. The key of unit layers without a group is ``"all"``.

    Raises:
        TypeError: for arguments of a wrong type.
        ValueError: for an amount out of range, or more than ``minimum`` and ``multiple``
            allow; unknown groups; groups without units; a layer given twice, or one that
            has changed since it was described; scores of another shape, missing, or for
            layers that are not listed; weights or scores that cannot be ranked.
        RuntimeError: if an earlier pruning of a tensor is incomplete.

    Example:
        >>> import timm, torch_dimap
        >>> vit = timm.create_model("vit_tiny_patch16_224", depth=2)
        >>> units = torch_dimap.group_units(vit)
        >>> done = global_module_aware_structured(units, {"heads": 0.5, "neurons": 0.25})
        >>> done["heads"].pruned, sum(done["neurons"].kept.values())
        (3, 1152)
    """
    groups = _check_units(units)
    _check_numbers(minimum, multiple)
    ranked = _rank(groups, importance_scores, pruning_method, multiple)
    totals = {
        group: sum(int(layer.unmasked.count_nonzero()) for layer in layers)
        for group, layers in ranked.items()
    }
    amounts = amounts_by_group(amount, totals, f"{CALL}: amount")
    keeps: dict[str, list[Tensor]] = {}
    done: dict[str, KeptUnits] = {}
    for group, layers in ranked.items():
        count = count_to_prune(amounts[group], totals[group], f"{CALL}: amount")
        try:
            keeps[group], threshold = choose_units(layers, count, minimum)
        except ValueError as error:
            raise ValueError(
                f"{CALL}: of {group!r} {error}: lower amount, minimum or multiple."
            ) from None
        kept = {
            layer.name: int(keep.count_nonzero())
            for layer, keep in zip(groups[group], keeps[group])
        }
        done[group] = KeptUnits(threshold, totals[group] - sum(kept.values()), kept)
    _mask(groups, keeps)
    return done


def _check_units(
    units: Mapping[str, Iterable[UnitLayer]] | Iterable[UnitLayer],
) -> dict[str, list[UnitLayer]]:
    """Check that what is to be masked is what was described, each layer once."""
    if isinstance(units, (nn.Module, UnitLayer)) or not isinstance(units, Iterable):
        raise TypeError(
            f"{CALL}: units must be a mapping group -> unit layers, or an iterable of unit "
            f"layers, found {type(units).__name__}: see group_units(model)."
        )
    listed = units if isinstance(units, Mapping) else {SINGLE_GROUP: units}
    groups = {group: list(layers) for group, layers in listed.items()}
    seen: set[tuple[str, str]] = set()
    for group, layers in groups.items():
        for layer in layers:
            if not isinstance(layer, UnitLayer):
                raise TypeError(
                    f"{CALL}: units[{group!r}] must hold unit layers, found "
                    f"{type(layer).__name__}: see group_units(model)."
                )
            if (layer.name, layer.kind) in seen:
                raise ValueError(f"{CALL}: {layer.name} is listed twice: list it once.")
            if not layer.is_current():
                raise ValueError(
                    f"{CALL}: {layer.name} had {layer.units} {layer.kind} when it was "
                    "described, and has another number now: call group_units(model) again."
                )
            seen.add((layer.name, layer.kind))
        if not layers:
            raise ValueError(f"{CALL}: units[{group!r}] is empty: list some, or leave it out.")
    if not groups:
        raise ValueError(f"{CALL}: units is empty, found no group and no unit layer.")
    return groups


def _check_numbers(minimum: Any, multiple: Any) -> None:
    for name, value, least in (("minimum", minimum, 0), ("multiple", multiple, 1)):
        if isinstance(value, bool) or not isinstance(value, numbers.Integral):
            raise TypeError(f"{CALL}: {name} must be an int, found {type(value).__name__}.")
        if value < least:
            raise ValueError(f"{CALL}: {name} must be {least} or more, found {value}.")


def _rank(
    groups: dict[str, list[UnitLayer]],
    importance_scores: Mapping[Any, Tensor] | None,
    pruning_method: Any,
    multiple: int,
) -> dict[str, list[LayerScores]]:
    """Give every unit a score that compares with those of other layers."""
    ranking = RANKINGS.get(pruning_method)
    if ranking is None:
        raise TypeError(
            f"{CALL}: pruning_method must be one of "
            f"{', '.join(method.__name__ for method in RANKINGS)}, found {pruning_method!r}: "
            "for a ranking of your own pass importance_scores."
        )
    given = _check_scores(groups, importance_scores)
    ranked: dict[str, list[LayerScores]] = {}
    for group, layers in groups.items():
        ranked[group] = []
        for layer in layers:
            unmasked = layer.unmasked().cpu()
            values = unit_norms(layer) if given is None else given[layer].detach().abs()
            scores = ranking(values.cpu().double().where(unmasked, 0.0))
            steps = multiple if layer.kind == NEURONS else 1
            ranked[group].append(LayerScores(scores, unmasked, steps))
    return ranked


def _check_scores(
    groups: dict[str, list[UnitLayer]], importance_scores: Mapping[Any, Tensor] | None
) -> dict[UnitLayer, Tensor] | None:
    """Return the given scores by unit layer, once there is a fitting one for each."""
    if importance_scores is None:
        return None
    if not isinstance(importance_scores, Mapping):
        raise TypeError(
            f"{CALL}: importance_scores must be a mapping unit layer -> tensor, found "
            f"{type(importance_scores).__name__}."
        )
    given: dict[UnitLayer, Tensor] = {}
    used = set()
    for layer in (layer for layers in groups.values() for layer in layers):
        key = next((key for key in (layer, layer.name) if key in importance_scores), None)
        if key is None:
            raise ValueError(
                f"{CALL}: importance_scores has none for {layer.name}: give scores for every "
                "layer in units, or none at all."
            )
        used.add(key)
        given[layer] = importance_scores[key]
        check_finite(given[layer], f"{CALL}: importance_scores of {layer.name}")
        if given[layer].shape != (layer.units,):
            raise ValueError(
                f"{CALL}: importance_scores of {layer.name} must have the shape "
                f"({layer.units},), found {tuple(given[layer].shape)}."
            )
    if len(used) < len(importance_scores):
        raise ValueError(
            f"{CALL}: importance_scores must be for layers listed in units, found "
            f"{len(importance_scores) - len(used)} more: leave them out, or list their layers."
        )
    return given


def _mask(groups: dict[str, list[UnitLayer]], keeps: dict[str, list[Tensor]]) -> None:
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
        CALL,
    )
    check_values(found, None, CALL)
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

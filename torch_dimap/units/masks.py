"""Whole units masked, heads ranked among heads and neurons among neurons."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils import prune

from torch_dimap.masking import DimapUnstructured, amounts_by_group, count_to_prune, listed
from torch_dimap.selection import dimap_scores
from torch_dimap.sharding import (
    Processes,
    agree,
    processes_of,
    refuse_everywhere,
    rest_sharded,
)
from torch_dimap.units.attaching import mask_units, maskable_parts
from torch_dimap.units.checks import check_numbers, check_scores, check_units, unit_layers_in
from torch_dimap.units.choice import LayerScores, choose_units, most_units
from torch_dimap.units.description import NEURONS, UnitLayer
from torch_dimap.units.scores import unit_magnitudes

CALL = "global_module_aware_structured()"

# What makes units of several layers comparable, from one number for each unit of a layer.
RANKINGS: dict[Any, Callable[[Tensor], Tensor]] = {
    DimapUnstructured: dimap_scores,
    prune.L1Unstructured: torch.abs,
    prune.RandomUnstructured: torch.rand_like,
}


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

    By default a unit's score comes from its weights alone. With ``d``, the norm of the rows
    that make the unit times the norm of the columns that read it, the score is ``d**2`` over
    the sum of all ``d**2`` of its layer that are not smaller: Eq. 10 of the DIMAP paper with
    units in place of weights.

    Whatever fails, the model is left as it was.

    Of a sharded model all processes must make the call, and a tensor at a time is gathered.
    The masks are those of the unsharded model.

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
    plan = plan_units(units, importance_scores, minimum, multiple, pruning_method, CALL)

    def choose() -> tuple[tuple[dict[str, list[Tensor]], dict[str, KeptUnits]], object]:
        chosen = plan.choose(amounts_by_group(amount, plan.unmasked, f"{CALL}: amount"))
        return chosen, chosen[1]

    keeps, done = agree(plan.processes, choose, CALL)
    mask_units(plan.groups, keeps, CALL)
    return done


class UnitPlan(NamedTuple):
    """Unit layers that are checked and ranked, before anything is masked."""

    caller: str
    groups: dict[str, list[UnitLayer]]
    scores: dict[str, list[LayerScores]]
    minimum: int
    processes: Processes | None = None  # that share the layers, where these are sharded

    @property
    def unmasked(self) -> dict[str, int]:
        """Group -> how many units no mask has taken yet."""
        return {
            group: sum(int(layer.unmasked.count_nonzero()) for layer in layers)
            for group, layers in self.scores.items()
        }

    @property
    def most(self) -> dict[str, int]:
        """Group -> how many of these can go at most."""
        return {group: most_units(x, self.minimum) for group, x in self.scores.items()}

    def choose(
        self, amounts: Mapping[str, float]
    ) -> tuple[dict[str, list[Tensor]], dict[str, KeptUnits]]:
        """Say for an amount of each group which units stay: one flag per unit and layer."""
        keeps: dict[str, list[Tensor]] = {}
        done: dict[str, KeptUnits] = {}
        for group, total in self.unmasked.items():
            count = count_to_prune(amounts[group], total, f"{self.caller}: amount")
            try:
                keeps[group], threshold = choose_units(self.scores[group], count, self.minimum)
            except ValueError as error:
                raise ValueError(
                    f"{self.caller}: of {group!r} {error}: lower amount, minimum or multiple."
                ) from None
            kept = {
                layer.name: int(keep.count_nonzero())
                for layer, keep in zip(self.groups[group], keeps[group])
            }
            done[group] = KeptUnits(threshold, total - sum(kept.values()), kept)
        return keeps, done


def plan_units(
    units: Mapping[str, Iterable[UnitLayer]] | Iterable[UnitLayer],
    importance_scores: Mapping[Any, Tensor] | None,
    minimum: int,
    multiple: int,
    pruning_method: Any,
    caller: str,
) -> UnitPlan:
    """Check and rank units; the arguments are those of the public call."""
    units = listed(units)
    found = list(unit_layers_in(units))
    rest_sharded(part.module for layer in found for part in layer.parts)
    try:
        groups = check_units(units, caller)
    except Exception as error:
        # The others are at the check below, and learn of it there.
        held = processes_of((part.tensor for layer in found for part in layer.parts), caller)
        refuse_everywhere(held, error, caller)
    layers = [layer for of_group in groups.values() for layer in of_group]
    processes = processes_of((part.tensor for x in layers for part in x.parts), caller)

    def check() -> tuple[dict[UnitLayer, Tensor] | None, object]:
        check_numbers(minimum, multiple, caller)
        _check_ranking(pruning_method, caller)
        given = check_scores(groups, importance_scores, caller)
        told = given and [values.tolist() for values in given.values()]
        names = {group: [layer.name for layer in layers] for group, layers in groups.items()}
        return given, (names, minimum, multiple, pruning_method.__name__, told)

    given = agree(processes, check, caller)
    maskable_parts(groups, caller)
    scores = _rank(groups, given, RANKINGS[pruning_method], multiple)
    if processes is not None:  # random ones are others in each process
        scores = processes.gather_object(scores)[0]
    return UnitPlan(caller, groups, scores, minimum, processes)


def _check_ranking(pruning_method: Any, caller: str) -> None:
    if pruning_method not in RANKINGS:
        raise TypeError(
            f"{caller}: pruning_method must be one of "
            f"{', '.join(method.__name__ for method in RANKINGS)}, found {pruning_method!r}: "
            "for a ranking of your own pass importance_scores."
        )


def _rank(
    groups: dict[str, list[UnitLayer]],
    given: Mapping[UnitLayer, Tensor] | None,
    ranking: Callable[[Tensor], Tensor],
    multiple: int,
) -> dict[str, list[LayerScores]]:
    """Give every unit a score that compares with those of other layers."""
    ranked: dict[str, list[LayerScores]] = {}
    for group, layers in groups.items():
        ranked[group] = []
        for layer in layers:
            unmasked = layer.unmasked().cpu()
            values = unit_magnitudes(layer) if given is None else given[layer].detach().abs()
            scores = ranking(values.cpu().double().where(unmasked, 0.0))
            steps = multiple if layer.kind == NEURONS else 1
            ranked[group].append(LayerScores(scores, unmasked, steps))
    return ranked

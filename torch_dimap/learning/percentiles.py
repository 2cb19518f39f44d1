"""Units in the order of their percentiles: what a rate takes, and what meets a cost."""

from __future__ import annotations

import numbers
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from torch_dimap.accounting import count_unit_flops
from torch_dimap.learning.gates import Units, layers_of
from torch_dimap.selection import check_finite
from torch_dimap.text import name_some
from torch_dimap.units import UnitLayer, mask_units

# Which units share one ranking, by what a layer is called or is of.
WITHIN = {"layer": lambda layer: (layer.name, layer.kind), "kind": lambda layer: layer.kind}


class KeptShare(NamedTuple):
    """What is left of a model once units are masked.

    Attributes:
        share: of the model's multiply-adds, after :func:`torch_dimap.remove_units`: counted,
            not weighted.
        kept: unit layer's name and kind -> how many units are left.
    """

    share: float
    kept: dict[tuple[str, str], int]


class Costs(NamedTuple):
    """What a model's units cost, and which of them must stay."""

    layers: tuple[UnitLayer, ...]
    each: list[int]  # multiply-adds of one unit of each layer
    whole: int  # of the whole model
    minimum: int

    @property
    def least(self) -> float:
        """The lowest share of the multiply-adds that can be kept."""
        gone = sum(
            cost * max(0, layer.units - self.minimum) for layer, cost in zip(self.layers, self.each)
        )
        return 1 - gone / self.whole

    def share(self, keeps: Sequence[Tensor]) -> float:
        """Return the share of the multiply-adds that is kept with these flags, one per unit."""
        gone = sum(cost * int((~keep).sum()) for cost, keep in zip(self.each, keeps))
        return 1 - gone / self.whole

    def check(self, target: float, caller: str) -> None:
        """Refuse a target that cannot be met."""
        if target < self.least:
            raise ValueError(
                f"{caller}: target must be at least {self.least:.4f}, the share of the "
                f"multiply-adds that is left where each layer keeps {self.minimum}, found "
                f"{target}: raise it."
            )

    def mask(self, keeps: Sequence[Tensor], caller: str) -> KeptShare:
        """Mask the units that do not stay, and say what is left."""
        mask_units({"all": list(self.layers)}, {"all": list(keeps)}, caller)
        kept = {(x.name, x.kind): int(keep.sum()) for x, keep in zip(self.layers, keeps)}
        return KeptShare(self.share(keeps), kept)


def prune_units_by_percentile(
    model: nn.Module,
    inputs: Tensor | tuple[Any, ...],
    target: float,
    units: Units,
    importance_scores: Mapping[Any, Tensor],
    within: str = "layer",
    minimum: int = 1,
) -> KeptShare:
    """Mask the units of the lowest percentiles until a share of the multiply-adds is met.

    The simpler modes beside :class:`LayerRates`, which learn no rates: a unit's percentile is
    its rank among its layer's, so that all layers lose the same share of their units; or
    among all of its kind, so that one threshold of the score cuts through the heads and one
    through the neurons of the model. The lowest go one by one, equal ones in the order of
    their layers, until the target is met. Near the end a unit that costs more than is still
    to go is passed over, where cheaper ones are left.

    Args:
        model: the model, masked in place.
        inputs: what to call it with to count multiply-adds.
        target: the share of the model's multiply-adds to keep, in (0, 1).
        units: as :func:`torch_dimap.group_units` returns them, with none masked yet.
        importance_scores: unit layer, or its name, -> one number per unit, larger means keep;
            such as :meth:`ClassMasks.scores`.
        within: ``"layer"``, or ``"kind"``, for which scores must compare between layers.
        minimum: how many units stay in each layer at the least.

    Returns:
        The share that is kept, and how many units each layer keeps.

    Raises:
        TypeError, ValueError: for arguments of a wrong type or out of range, scores that are
            missing or of another shape, or a target that cannot be met (the message names
            the lowest).

    Example:
        >>> import timm, torch, torch_dimap
        >>> vit = timm.create_model("vit_tiny_patch16_224", depth=2)
        >>> units, image = torch_dimap.group_units(vit), torch.zeros(1, 3, 224, 224)
        >>> scores = {x: torch.rand(x.units) for x in units["heads"] + units["neurons"]}
        >>> done = prune_units_by_percentile(vit, image, 0.6, units, scores)
        >>> slim = torch_dimap.remove_units(vit)
        >>> 0.599 < done.share <= 0.6, sorted(done.kept.values())[-1] < 768
        (True, True)
    """
    caller = "prune_units_by_percentile()"
    if within not in WITHIN:
        raise ValueError(f"{caller}: within must be 'layer' or 'kind', found {within!r}.")
    if isinstance(target, bool) or not isinstance(target, numbers.Real) or not 0 < target < 1:
        raise ValueError(
            f"{caller}: target must be a share of the multiply-adds between 0 and 1, found "
            f"{target!r}."
        )
    costs = count_costs(model, inputs, units, minimum, caller)
    costs.check(float(target), caller)
    scores = check_unit_scores(costs.layers, importance_scores, caller)
    keys = [WITHIN[within](layer) for layer in costs.layers]
    ranks = percentiles_within(scores, keys)
    return costs.mask(_cut(costs, ranks, float(target)), caller)


def percentiles_within(scores: Sequence[Tensor], keys: Sequence[Any]) -> list[Tensor]:
    """Return each unit's rank among those of layers of the same key, as a number in (0, 1).

    The lowest of ``n`` scores gets ``0.5 / n``, the highest ``1 - 0.5 / n``; of equal ones the
    earlier gets less.

    Example:
        >>> found = percentiles_within([torch.tensor([3.0, 1.0]), torch.tensor([2.0, 4.0])], "aa")
        >>> [ranks.tolist() for ranks in found]
        [[0.625, 0.125], [0.375, 0.875]]
    """
    found: list[Tensor] = [torch.empty(0)] * len(scores)
    for key in dict.fromkeys(keys):
        members = [i for i, own in enumerate(keys) if own == key]
        together = torch.cat([scores[i].double().cpu() for i in members])
        ranks = torch.empty(len(together), dtype=torch.float64)
        order = together.argsort(stable=True)
        ranks[order] = (torch.arange(len(together), dtype=torch.float64) + 0.5) / len(together)
        for i, own in zip(members, ranks.split([len(scores[i]) for i in members])):
            found[i] = own
    return found


def keep_above(percentiles: Tensor, rate: float | Tensor, minimum: int) -> Tensor:
    """Return one flag per unit: above the rate, or among the ``minimum`` highest."""
    order = percentiles.argsort(descending=True, stable=True)
    keep = percentiles > rate
    keep[order[:minimum]] = True
    return keep


def count_costs(
    model: nn.Module, inputs: Any, units: Units, minimum: Any, caller: str
) -> Costs:
    """Count what each layer's units cost; refuse layers that have masked ones."""
    layers = layers_of(model, units, caller)
    if isinstance(minimum, bool) or not isinstance(minimum, numbers.Integral) or minimum < 1:
        raise ValueError(f"{caller}: minimum must be an int, 1 or more, found {minimum!r}.")
    masked = [layer.name for layer in layers if not layer.unmasked().all()]
    if masked:
        raise ValueError(
            f"{caller}: expected units without masks, found masked ones in {name_some(masked)}: "
            "call remove_units(model) and group_units(model) first."
        )
    whole, counted = count_unit_flops(model, inputs, layers, caller)
    return Costs(layers, [x.multiply_adds or 0 for x in counted], whole, int(minimum))


def check_unit_scores(
    layers: Sequence[UnitLayer], importance_scores: Any, caller: str
) -> list[Tensor]:
    """Return the scores of each layer, once there is a fitting one for all of them."""
    if not isinstance(importance_scores, Mapping):
        raise TypeError(
            f"{caller}: importance_scores must be a mapping unit layer -> tensor, found "
            f"{type(importance_scores).__name__}."
        )
    found = []
    for layer in layers:
        scores = importance_scores.get(layer, importance_scores.get(layer.name))
        if scores is None:
            raise ValueError(f"{caller}: importance_scores has none for {layer.name}: add it.")
        check_finite(scores, f"{caller}: importance_scores of {layer.name}")
        if scores.shape != (layer.units,):
            raise ValueError(
                f"{caller}: importance_scores of {layer.name} must have the shape "
                f"({layer.units},), found {tuple(scores.shape)}."
            )
        found.append(scores.detach())
    return found


def _cut(costs: Costs, percentiles: Sequence[Tensor], target: float) -> list[Tensor]:
    """Take the lowest percentiles, one unit after the other, until the target is met.

    A unit that costs more than is still to go is passed over as long as cheaper ones are left,
    or the last head would take more than was asked for.
    """
    keeps = [torch.ones(layer.units, dtype=torch.bool) for layer in costs.layers]
    order = sorted(
        (float(p), i, unit)
        for i, ranks in enumerate(percentiles)
        for unit, p in enumerate(ranks.tolist())
    )
    left = [layer.units for layer in costs.layers]
    excess = costs.whole * (1 - target)  # still to go
    for last in (False, True):
        for _, i, unit in order:
            if excess <= 0:
                return keeps
            if keeps[i][unit] and left[i] > costs.minimum and (last or costs.each[i] <= excess):
                keeps[i][unit] = False
                left[i] -= 1
                excess -= costs.each[i]
        order.sort(key=lambda place: costs.each[place[1]])  # stable: the cheapest, lowest first
    return keeps

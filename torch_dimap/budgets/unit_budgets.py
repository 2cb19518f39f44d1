"""Budgets of whole units: the smallest amount whose removal meets a target."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from torch_dimap.accounting import Inputs, count_savings, count_unit_flops
from torch_dimap.budgets.smallest import absolute, check_fixed, smallest
from torch_dimap.masking import DimapUnstructured
from torch_dimap.units import KeptUnits, UnitLayer, UnitPlan, group_units, mask_units, plan_units

Units = Mapping[str, Iterable[UnitLayer]] | Iterable[UnitLayer]


class UnitBudget(NamedTuple):
    """How a budget of multiply-adds was met by whole units.

    Attributes:
        amount: group -> amount of its unmasked units that went, as
            :func:`torch_dimap.global_module_aware_structured` takes it.
        units: group -> thresholds and how many units each layer keeps, as that returns them.
        target: what was asked for, in multiply-adds.
        reached: what :func:`torch_dimap.count_flops` counts after
            :func:`torch_dimap.remove_units`, at most ``target``.
    """

    amount: dict[str, float]
    units: dict[str, KeptUnits]
    target: int
    reached: int


def prune_units_to_flops(
    model: nn.Module,
    inputs: Inputs,
    target: float,
    units: Units | None = None,
    fixed: Mapping[str, float] | None = None,
    importance_scores: Mapping[Any, Tensor] | None = None,
    minimum: int = 1,
    multiple: int = 16,
) -> UnitBudget:
    """Mask the smallest amount of units whose removal meets a number of multiply-adds.

    One amount for heads and neurons, or for those that ``fixed`` leaves free, is found to
    within one unit of the largest group; where a group may not lose that much, since
    ``minimum`` must stay, it loses as much as it may. The units are masked once, and
    nothing is cut: train, then call :func:`torch_dimap.remove_units`. What a model costs
    without them is not weighted by densities but counted, products of a head's queries,
    keys and values included.

    Args:
        model: the model, masked in place.
        inputs: what to call the model with to count multiply-adds, as in
            :func:`torch_dimap.count_flops`.
        target: int, multiply-adds for ``inputs``; or float in [0, 1], the fraction of
            those of the model before the call, with units in it that are only masked.
        units: as in :func:`torch_dimap.global_module_aware_structured`. Default:
            ``group_units(model)``.
        fixed: group -> amount that is given and not to be found.
        importance_scores: as in :func:`torch_dimap.global_module_aware_structured`.
        minimum: as there.
        multiple: as there.

    Returns:
        The amounts of the groups, what each layer keeps, the target, and what is reached.

    Raises:
        TypeError, ValueError: for a target of a wrong type or out of range, or below
            what is left if all goes that may (the message names the lowest), unknown
            groups in ``fixed``, or none left free; and as
            :func:`torch_dimap.global_module_aware_structured`.
        NotImplementedError: if multiply-adds cannot be counted.

    Example:
        >>> import timm, torch, torch_dimap
        >>> vit = timm.create_model("vit_tiny_patch16_224", depth=2)
        >>> image = torch.zeros(1, 3, 224, 224)
        >>> budget = prune_units_to_flops(vit, image, 0.5)
        >>> budget.amount["heads"] == budget.amount["neurons"]
        True
        >>> slim = torch_dimap.remove_units(vit)
        >>> torch_dimap.count_flops(slim, image).dense == budget.reached <= budget.target
        True
    """
    caller = "prune_units_to_flops()"
    listed = group_units(model) if units is None else units
    plan = plan_units(listed, importance_scores, minimum, multiple, DimapUnstructured, caller)
    search = plan_search(plan, fixed)
    layers = list(search.stay(0))
    emptied = {layer: keep for layer, keep in search.stay(search.steps).items() if not keep.any()}
    model = getattr(model, "_orig_mod", model)  # what torch.compile wraps
    whole, counted = count_unit_flops(model, inputs, layers, caller)
    costs = {layer: x.multiply_adds or 0 for layer, x in zip(layers, counted)}
    # A layer without any unit has no use for what its units share either.
    branches = count_savings(model, inputs, emptied, caller)[1] if emptied else {}
    wanted = absolute(target, whole, "multiply-adds", caller)

    def left(step: int) -> int:
        return whole - sum(
            costs[layer] * (layer.units - int(keep.count_nonzero()))
            if keep.any()
            else branches[layer]
            for layer, keep in search.stay(step).items()
        )

    lowest = left(search.steps)
    if lowest > wanted:
        raise ValueError(
            f"{caller}: target must be at least the {lowest} multiply-adds left when all goes "
            f"that {search.limits} allow, found {wanted}: raise it, or let more go."
        )
    step, reached = smallest(left, wanted, search.steps)
    return UnitBudget(search.amounts(step), search.mask(step), wanted, reached)


class Search(NamedTuple):
    """Which units stay at each step from nothing to all that may go."""

    plan: UnitPlan
    fixed: dict[str, float]
    steps: int
    alive: dict[UnitLayer, Tensor]

    @property
    def limits(self) -> str:
        """What keeps more units from going, for messages."""
        return "fixed, minimum and multiple" if self.fixed else "minimum and multiple"

    def amounts(self, step: int) -> dict[str, float]:
        """Group -> its amount: the given one, or the step's as far as the group may go."""
        most = self.plan.most
        return {
            group: self.fixed.get(group, min(step / self.steps, most[group] / max(1, total)))
            for group, total in self.plan.unmasked.items()
        }

    def stay(self, step: int) -> dict[UnitLayer, Tensor]:
        """Unit layer -> one flag per unit: False for what removal would cut."""
        keeps, _ = self.plan.choose(self.amounts(step))
        return {
            layer: layer.staying(keep & self.alive[layer])
            for group, layers in self.plan.groups.items()
            for layer, keep in zip(layers, keeps[group])
        }

    def mask(self, step: int) -> dict[str, KeptUnits]:
        """Mask what goes at a step, and say what is kept."""
        keeps, done = self.plan.choose(self.amounts(step))
        mask_units(self.plan.groups, keeps, self.plan.caller)
        return done


def plan_search(
    plan: UnitPlan, fixed: Mapping[str, float] | None, steps: int | None = None
) -> Search:
    """Prepare a search in steps of one unit of the largest free group, or in so many."""
    given = check_fixed(fixed or {}, plan.unmasked, plan.caller)
    free = [count for group, count in plan.unmasked.items() if group not in given]
    layers = [layer for members in plan.groups.values() for layer in members]
    alive = {layer: layer.alive().cpu() for layer in layers}
    return Search(plan, given, steps or max(1, *free), alive)

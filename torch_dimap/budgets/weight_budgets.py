"""Pruning for a budget: the smallest amount that meets a number of FLOPs or parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor, nn

from torch_dimap.accounting import Inputs, count_flops, weighted_flops
from torch_dimap.budgets.smallest import absolute, check_fixed, smallest
from torch_dimap.masking import (
    Layer,
    Pair,
    Parameters,
    Scores,
    check_values,
    choose_masks,
    count_nonzero,
    count_to_prune,
    find_layers_in,
    left_of,
    prune_layers,
    unpruned_by_group,
)


class Budget(NamedTuple):
    """How a budget was met.

    Attributes:
        amount: group -> amount of its unpruned weights that went, as
            :func:`torch_dimap.global_module_aware_unstructured` takes it.
        thresholds: group -> the highest score that went.
        target: what was asked for, in FLOPs or parameters.
        reached: what is left, at most ``target`` (masked FLOPs, or parameters that are
            not zero).
    """

    amount: dict[str, float]
    thresholds: dict[str, float]
    target: int
    reached: int


def prune_to_flops(
    model: nn.Module,
    inputs: Inputs,
    target: float,
    parameters: Parameters | None = None,
    fixed: Mapping[str, float] | None = None,
    importance_scores: Mapping[Pair, Tensor] | None = None,
) -> Budget:
    """Prune with DIMAP by the smallest amount that meets a number of masked FLOPs.

    One amount for all groups, or for those that ``fixed`` leaves free, is found to
    within one weight of the largest of them, and the model is pruned once. FLOPs are
    those of :func:`torch_dimap.count_flops`, every layer weighted by its own density.

    Args:
        model: the model, pruned in place.
        inputs: what to call the model with to count FLOPs, as in :func:`count_flops`.
        target: int, multiply-adds for ``inputs``; or float in [0, 1], the fraction of
            the dense model's, all of its layers included.
        parameters: as in :func:`torch_dimap.global_module_aware_unstructured`.
            Default: ``group_parameters(model)``.
        fixed: group -> amount that is given and not to be found.
        importance_scores: as in :func:`torch_dimap.global_module_aware_unstructured`.

    Returns:
        The amounts and thresholds of the groups, the target, and what was reached.

    Raises:
        TypeError, ValueError: for a target of a wrong type or out of range, or below
            what is left if all free groups go (the message names the lowest), unknown
            groups in ``fixed``, or none left free; and as
            :func:`torch_dimap.global_module_aware_unstructured`.
        NotImplementedError: if FLOPs cannot be counted.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Linear(20, 10), nn.Linear(10, 10))
        >>> pairs = [(net[0], "weight"), (net[1], "weight")]
        >>> budget = prune_to_flops(net, torch.zeros(1, 20), 0.25, pairs)
        >>> budget.amount, budget.target, budget.reached
        ({'all': 0.75}, 75, 75)
    """
    caller = "prune_to_flops()"
    layers = find_layers_in(model, parameters, caller)
    pairs = {group: [(x.module, x.name) for x in members] for group, members in layers.items()}
    flops = count_flops(model, inputs, pairs)
    costs = {label: layer.dense for label, layer in flops.layers.items()}
    plan = _Plan(caller, "FLOPs", flops.dense, costs, layers, importance_scores)
    return _prune(plan, target, fixed)


def prune_to_parameters(
    model: nn.Module,
    target: float,
    parameters: Parameters | None = None,
    fixed: Mapping[str, float] | None = None,
    importance_scores: Mapping[Pair, Tensor] | None = None,
) -> Budget:
    """Prune with DIMAP by the smallest amount that meets a number of parameters.

    What counts are all parameters of the model less the zeros in its groups, as in
    Table 1 of the paper. All else is as in :func:`prune_to_flops`.

    Args:
        model: the model, pruned in place.
        target: int, a number of parameters to keep; or float in [0, 1], the fraction
            of all parameters of the model.
        parameters: as in :func:`prune_to_flops`.
        fixed: as in :func:`prune_to_flops`.
        importance_scores: as in :func:`prune_to_flops`.

    Returns:
        The amounts and thresholds of the groups, the target, and what was reached.

    Raises:
        TypeError, ValueError: as :func:`prune_to_flops`.

    Example:
        >>> net = nn.Sequential(nn.Linear(20, 10), nn.Linear(10, 10))
        >>> pairs = [(net[0], "weight"), (net[1], "weight")]
        >>> prune_to_parameters(net, 200, pairs).reached
        200
    """
    caller = "prune_to_parameters()"
    layers = find_layers_in(model, parameters, caller)
    whole = sum(parameter.numel() for parameter in model.parameters())
    costs = {x.label: x.parameter.numel() for group in layers.values() for x in group}
    plan = _Plan(caller, "parameters", whole, costs, layers, importance_scores)
    return _prune(plan, target, fixed)


class _Plan(NamedTuple):
    """What a budget is counted in, and what it is counted on."""

    caller: str
    unit: str
    whole: int  # of the dense model
    costs: dict[str, int]  # of each dense layer, by label
    layers: dict[str, list[Layer]]
    importance_scores: Scores | None


def _prune(plan: _Plan, target: float, fixed: Mapping[str, float] | None) -> Budget:
    values = check_values(plan.layers, plan.importance_scores, plan.caller)
    unpruned = unpruned_by_group(plan.layers, plan.caller)
    wanted = absolute(target, plan.whole, plan.unit, plan.caller)
    amount = check_fixed(fixed or {}, unpruned, plan.caller)

    def left(group: str, amount: float) -> int:
        count = count_to_prune(amount, unpruned[group], f"{plan.caller}: fixed[{group!r}]")
        return 0 if count == unpruned[group] else _left(plan, group, values, count)

    bound = plan.whole - sum(plan.costs.values()) + sum(left(g, a) for g, a in amount.items())
    if bound > wanted:
        raise ValueError(
            f"{plan.caller}: target must be at least the {bound} {plan.unit} left when "
            f"{'all that is not fixed' if fixed else 'every prunable weight'} is pruned, found "
            f"{wanted}: raise it, or let more be pruned."
        )
    free = [group for group in unpruned if group not in amount]
    steps = max(1, *(unpruned[group] for group in free))
    # In steps of one weight of the largest group, which are at most one of any other.
    step, reached = smallest(
        lambda step: bound + sum(left(group, step / steps) for group in free), wanted, steps
    )
    amount = {group: amount.get(group, step / steps) for group in unpruned}
    thresholds = prune_layers(plan.layers, values, amount, plan.caller)
    return Budget(amount, thresholds, wanted, reached)


def _left(plan: _Plan, group: str, values: Mapping[str, list[Tensor]], count: int) -> int:
    """Return what a group still costs when its ``count`` lowest weights are gone."""
    layers = plan.layers[group]
    masks = choose_masks(plan.layers, values, {group: count}, plan.caller)[group].masks
    kept = count_nonzero([left_of(x, mask) for x, mask in zip(layers, masks)], plan.caller)
    return sum(weighted_flops(plan.costs[layer.label], n, layer.parameter.numel())
               for layer, n in zip(layers, kept))  # fmt: skip

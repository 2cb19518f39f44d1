"""The pruning calls: groups of layers masked in one go, by DIMAP or any of torch's methods."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from torch_dimap.masking.amounts import amounts_by_group, count_to_prune, warn_of_few
from torch_dimap.masking.attaching import all_or_nothing, attach, bake
from torch_dimap.masking.checked import find_checked
from torch_dimap.masking.choice import Chosen, choose_masks, is_empty, unpruned_by_group
from torch_dimap.masking.layers import Layer, Pair, pruned_tensors, refuse_sharded
from torch_dimap.masking.method import DimapUnstructured
from torch_dimap.masking.readers import hold, known_readers, release
from torch_dimap.masking.sharded import stop_dropping
from torch_dimap.masking.values import Scores
from torch_dimap.selection import check_finite
from torch_dimap.sharding import agree, managed_names, processes_of
from torch_dimap.text import warn_of_empty


def dimap_unstructured(
    module: nn.Module, name: str, amount: float, importance_scores: Tensor | None = None
) -> nn.Module:
    """Prune the entries of one tensor with the lowest DIMAP scores.

    Inside one layer these are the entries of lowest magnitude: apart from the choice
    among equal magnitudes it is ``prune.l1_unstructured``. The module is changed in
    place as described there: parameter ``<name>_orig``, buffer ``<name>_mask`` (boolean
    here), attribute ``<name>``, and a forward pre-hook that keeps the latter up to date.

    Args:
        module: the module that holds the tensor.
        name: the parameter's name in it.
        amount: float, the fraction of the unpruned entries; int, their number.
        importance_scores: tensor of the parameter's shape to rank by in its place;
            its magnitude counts, and larger means keep.

    Returns:
        ``module``.

    Raises:
        TypeError, ValueError, RuntimeError: see :func:`global_module_aware_unstructured`.

    Example:
        >>> layer = dimap_unstructured(nn.Linear(10, 10), "weight", amount=0.3)
        >>> int(layer.weight_mask.sum())
        70
    """
    caller = "dimap_unstructured()"
    scores = None if importance_scores is None else {(module, name): importance_scores}
    prune_layers(*find_checked([(module, name)], scores, caller), amount, caller)
    return module


def global_module_aware_unstructured(
    parameters: Mapping[str, Iterable[Pair]] | Iterable[Pair],
    pruning_method: Callable[..., prune.BasePruningMethod] = DimapUnstructured,
    importance_scores: Scores | None = None,
    *,
    amount: float | Mapping[str, float] | None = None,
    **kwargs: Any,
) -> dict[str, float]:
    """Prune groups of tensors in place, ranking each group for itself.

    Takes the place of ``prune.global_unstructured`` and leaves the same things behind
    on every module: parameter ``<name>_orig``, buffer ``<name>_mask``, attribute
    ``<name>``, and a forward pre-hook; a ``PruningContainer`` where the tensor was
    pruned before. ``prune.remove`` or :func:`remove_all` makes it permanent. Masks are
    boolean: a quarter of the memory of float32, and the same under ``half()``. Unlike
    torch's, ``<name>_orig`` keeps the place that the parameter had in its module.

    Whatever fails, the model is left as it was.

    Args:
        parameters: group -> ``(module, name)`` pairs, as :func:`group_parameters`
            returns them; or pairs alone, which form one group. For pairs listed by
            hand see :func:`hold_masks`; of tied weights, list none: the call sees
            one place only, and the other stays dense.
        pruning_method: :class:`DimapUnstructured`, or any other class of
            ``PRUNING_TYPE`` ``"unstructured"``, which then gets each group's
            unpruned values in one flat tensor.
        importance_scores: ``(module, name)`` -> tensor of the parameter's shape that
            stands in for the weights, for all pairs; None in place of a tensor stands for
            the weights. As in torch their magnitude counts, and larger means keep.
        amount: of the weights still unpruned: float, the fraction of every group; int,
            the total over all groups, shared out in proportion to their unpruned sizes;
            dict, group -> float or int. Exactly ``round(amount * unpruned)`` of a group
            go. An int below a thousandth of all gives a warning: 50 is no 50 %. None for
            methods that take no amount.
        kwargs: passed to ``pruning_method``.

    Returns:
        Group -> threshold, the highest score that went; 0.0 if nothing did. For
        DIMAP this is the number that the paper prints; for other methods it is the
        largest magnitude that went. A flat iterable's key is ``"all"``.

    Raises:
        TypeError: for arguments of a wrong type, a structured ``pruning_method``, or a
            tensor of a dtype that cannot be ranked.
        ValueError: for an amount out of range, unknown groups, groups without
            weights, a tensor given twice (also under two names), names that are no
            parameters, weights that are sparse, quantized or computed from others, weights
            or scores on the meta device or with NaN or infinity, scores of another shape,
            missing, or for pairs that are not listed.
        RuntimeError: if an earlier pruning of a tensor is incomplete.

    Source: He and Zhou, ICLR 2024, Sec. 4.1.

    Example:
        >>> net = nn.Sequential(nn.Linear(20, 10), nn.Linear(10, 10))
        >>> groups = {"first": [(net[0], "weight")], "second": [(net[1], "weight")]}
        >>> thresholds = global_module_aware_unstructured(groups, amount=0.5)
        >>> sorted(thresholds), int(net[0].weight_mask.sum()), int(net[1].weight_mask.sum())
        (['first', 'second'], 100, 50)
    """
    caller = "global_module_aware_unstructured()"
    groups, values = find_checked(parameters, importance_scores, caller)
    return prune_layers(groups, values, amount, caller, pruning_method, kwargs)


def prune_layers(
    groups: Mapping[str, list[Layer]],
    values: Mapping[str, list[Tensor]],
    amount: Any,
    caller: str,
    pruning_method: Callable[..., prune.BasePruningMethod] = DimapUnstructured,
    kwargs: Mapping[str, Any] | None = None,
) -> dict[str, float]:
    """Prune layers that have been checked, by the values to rank them by; return thresholds."""
    unpruned = unpruned_by_group(groups, caller)
    processes = processes_of((x.parameter for of in groups.values() for x in of), caller)

    def plan_methods() -> tuple[tuple, object]:
        makers = _makers(pruning_method, amount, kwargs or {}, unpruned, caller)
        methods = {group: _unstructured(maker(), caller) for group, maker in makers.items()}
        ours = {g: method for g, method in methods.items() if _ranks_by_dimap(method)}
        counts = {g: count_to_prune(method.amount, unpruned[g], f"{caller}: amount")
                  for g, method in ours.items()}  # fmt: skip
        if len(ours) < len(methods):
            named = [(x.label, x.parameter) for of_group in groups.values() for x in of_group]
            refuse_sharded(named, f"{caller}: pruning_method is not DimapUnstructured")
        return (makers, methods, counts), counts

    makers, methods, counts = agree(processes, plan_methods, caller)
    if len(counts) == len(methods):
        chosen = choose_masks(groups, values, counts, caller)
    else:
        chosen = {g: _choose_flat(methods[g], layers, values[g], caller)
                  for g, layers in groups.items()}  # fmt: skip
    plan = [(layer, group, mask) for group, layers in groups.items()
            for layer, mask in zip(layers, chosen[group].masks)]  # fmt: skip
    emptied = [flag for g in groups for flag in chosen[g].emptied]
    empty = [layer.label for (layer, _, _), flag in zip(plan, emptied) if flag]
    warn_of_empty(empty, caller)  # first: where warnings are errors, nothing may change
    readers = known_readers(layer.module for layer, _, _ in plan)
    with all_or_nothing([*(layer.module for layer, _, _ in plan), *readers]):
        managed = managed_names(layer.module for layer, _, _ in plan)
        for layer, group, mask in plan:
            attach(layer, makers[group](), mask, managed)
        for reader in readers:
            hold(reader)
    return {group: chosen[group].threshold for group in groups}


def remove_all(model: nn.Module) -> nn.Module:
    """Make all pruning in a model permanent: ``prune.remove`` on every pruned tensor.

    The zeros are then ordinary weights, and a further optimizer step may fill them.

    Args:
        model: any module; one without pruned tensors is left alone.

    Returns:
        ``model``.

    Raises:
        TypeError: if ``model`` is no module.
        RuntimeError: if a tensor has a pruning hook, but no mask or no original.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"remove_all(): model must be an nn.Module, found {type(model).__name__}.")
    layers = list(pruned_tensors(model, "remove_all()"))  # all are sound, or nothing changes
    for layer in {(x.module, x.name): x for x in layers}.values():  # shared ones once
        bake(layer)
    for module in model.modules():
        release(module)
        stop_dropping(module)
    return model


def _makers(
    pruning_method: Callable[..., prune.BasePruningMethod],
    amount: Any,
    kwargs: Mapping[str, Any],
    unpruned: Mapping[str, int],
    caller: str,
) -> dict[str, Callable[[], prune.BasePruningMethod]]:
    """Return group -> what makes the pruning method of one of its layers."""
    if not callable(pruning_method) or isinstance(pruning_method, prune.BasePruningMethod):
        raise TypeError(
            f"{caller}: pruning_method must be a pruning class, such as DimapUnstructured, "
            f"found {type(pruning_method).__name__}."
        )
    if "sizes" in kwargs:
        raise TypeError(
            f"{caller}: sizes follow from parameters here; they are for prune.global_unstructured."
        )
    if amount is None:
        return {group: partial(pruning_method, **kwargs) for group in unpruned}
    amounts = amounts_by_group(amount, unpruned, f"{caller}: amount")
    warn_of_few(amount, sum(unpruned.values()), f"{caller}: amount")
    return {g: partial(pruning_method, amount=own, **kwargs) for g, own in amounts.items()}


def _unstructured(method: prune.BasePruningMethod, caller: str) -> prune.BasePruningMethod:
    """Raise unless a method removes weights one by one."""
    kind = getattr(method, "PRUNING_TYPE", None)
    if kind != "unstructured":
        raise TypeError(
            f"{caller}: pruning_method must have the PRUNING_TYPE 'unstructured', found "
            f"{kind!r}: rankings of single weights cannot remove whole channels."
        )
    return method


def _ranks_by_dimap(method: prune.BasePruningMethod) -> TypeGuard[DimapUnstructured]:
    """Tell a method that needs no flat tensor from those with a ranking of their own."""
    return type(method).compute_mask is DimapUnstructured.compute_mask


def _choose_flat(
    method: prune.BasePruningMethod, layers: list[Layer], values: list[Tensor], caller: str
) -> Chosen:
    """Let any of torch's methods choose among the unpruned values of a group."""
    for layer, own in zip(layers, values):
        check_finite(own, f"{caller}: {layer.label}")
    device = values[0].device
    masks = [layer.mask for layer in layers]
    allowed = [
        torch.ones_like(x, dtype=torch.bool) if mask is None else mask != 0
        for x, mask in zip(values, masks)
    ]
    flat = torch.cat([x[keep].to(device) for x, keep in zip(values, allowed)])
    sizes = [int(keep.count_nonzero()) for keep in allowed]
    if isinstance(method, DimapUnstructured):  # one that goes on from DIMAP's choice
        method.sizes = sizes
    kept = method.compute_mask(flat, default_mask=torch.ones_like(flat)) != 0
    for keep, part in zip(allowed, kept.split(sizes)):
        keep[keep.clone()] = part.to(keep.device)
    pruned = flat[~kept].abs()
    threshold = float(pruned.max()) if pruned.numel() else 0.0
    return Chosen(allowed, list(map(is_empty, allowed)), threshold)

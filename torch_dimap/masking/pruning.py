"""DIMAP as a method of ``torch.nn.utils.prune``, and module-aware pruning with any method."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from torch_dimap.masking.amounts import amounts_by_group, check_amount, count_to_prune
from torch_dimap.masking.attaching import all_or_nothing, attach
from torch_dimap.masking.grouping import Pair
from torch_dimap.masking.readers import (
    hold,
    known_readers,
    pruned_tensors,
    pruning_methods,
    release,
)
from torch_dimap.masking.targets import CALL, Target, check_targets
from torch_dimap.selection import check_finite, select
from torch_dimap.text import name_some


class DimapUnstructured(prune.BasePruningMethod):
    """Prune the (currently unpruned) entries with the lowest DIMAP scores.

    In :func:`global_module_aware_unstructured` and :func:`dimap_unstructured` the
    layers are known and this class needs nothing but the amount. In torch's own
    ``prune.global_unstructured`` all layers arrive as one flat tensor; ``sizes`` then
    tells where one ends and the next begins, since every layer has its own energy.

    Args:
        amount: int, a number of entries, or float, the fraction of them in [0, 1].
        sizes: the number of entries of each layer, in order, that the tensor
            concatenates: ``numel()`` each, or on a repeated call, where torch passes
            unpruned entries only, ``int(weight_mask.sum())`` each. None: one layer.

    Raises:
        TypeError: if ``amount`` is neither int nor float.
        ValueError: if it is negative, NaN or a fraction above 1; later, if ``sizes``
            does not add up to the tensor.
    """

    PRUNING_TYPE = "unstructured"

    def __init__(self, amount: float, sizes: Iterable[int] | None = None) -> None:
        check_amount(amount, "DimapUnstructured(): amount")
        self.amount = amount
        self.sizes = None if sizes is None else [int(size) for size in sizes]

    def compute_mask(self, t: Tensor, default_mask: Tensor) -> Tensor:
        """Return ``default_mask`` with the lowest-scoring of its entries set to zero.

        Args:
            t: what to rank by, finite; the weights or scores in their place.
            default_mask: tensor of the shape of ``t``, 1 where an entry may go.
        """
        check_finite(t, "DimapUnstructured.compute_mask(): t")
        sizes = [t.numel()] if self.sizes is None else self.sizes
        if sum(sizes) != t.numel() or min(sizes, default=0) < 0:
            raise ValueError(
                f"DimapUnstructured(): sizes must add up to the {t.numel()} entries to rank, "
                f"found a sum of {sum(sizes)}: on a repeated call only unpruned entries count."
            )
        chooseable = default_mask.reshape(-1) != 0
        count = count_to_prune(
            self.amount, int(chooseable.count_nonzero()), "DimapUnstructured(): amount"
        )
        keep, _ = select(t.reshape(-1).split(sizes), count, chooseable.split(sizes))
        return torch.cat(keep).view(t.shape).to(default_mask.dtype)


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
    scores = None if importance_scores is None else {(module, name): importance_scores}
    global_module_aware_unstructured([(module, name)], importance_scores=scores, amount=amount)
    return module


def global_module_aware_unstructured(
    parameters: Mapping[str, Iterable[Pair]] | Iterable[Pair],
    pruning_method: Callable[..., prune.BasePruningMethod] = DimapUnstructured,
    importance_scores: Mapping[Pair, Tensor] | None = None,
    **kwargs: Any,
) -> dict[str, float]:
    """Prune groups of tensors in place, ranking each group for itself.

    Takes the place of ``prune.global_unstructured`` and leaves the same things behind
    on every module: parameter ``<name>_orig``, buffer ``<name>_mask``, attribute
    ``<name>``, and a forward pre-hook; a ``PruningContainer`` where the tensor was
    pruned before. ``prune.remove`` or :func:`remove_all` makes it permanent. Masks are
    boolean: a quarter of the memory of float32, exact under EMA and ``half()``.

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
            stands in for the weights, for all pairs or none. As in torch their
            magnitude counts, and larger means keep.
        kwargs: passed to ``pruning_method``. Among them ``amount``, of the weights
            still unpruned: float, the fraction of every group; int, the total over
            all groups, shared out in proportion to their unpruned sizes; dict, group
            -> float or int. Exactly ``round(amount * unpruned)`` of a group go.

    Returns:
        Group -> threshold, the highest score that went; 0.0 if nothing did. For
        DIMAP this is the number that the paper prints; for other methods it is the
        largest magnitude that went. A flat iterable's key is ``"all"``.

    Raises:
        TypeError: for arguments of a wrong type, a structured ``pruning_method``, or a
            tensor of a dtype that cannot be ranked.
        ValueError: for an amount out of range, unknown groups, groups without
            weights, a tensor given twice (also under two names), names that are no
            parameters, weights or scores on the meta device or with NaN or infinity,
            scores of another shape, missing, or for pairs that are not listed.
        RuntimeError: if an earlier pruning of a tensor is incomplete.

    Source: He and Zhou, ICLR 2024, Sec. 4.1.

    Example:
        >>> net = nn.Sequential(nn.Linear(20, 10), nn.Linear(10, 10))
        >>> groups = {"first": [(net[0], "weight")], "second": [(net[1], "weight")]}
        >>> thresholds = global_module_aware_unstructured(groups, amount=0.5)
        >>> sorted(thresholds), int(net[0].weight_mask.sum()), int(net[1].weight_mask.sum())
        (['first', 'second'], 100, 50)
    """
    groups = check_targets(parameters, importance_scores)
    unpruned = {group: sum(t.unpruned for t in targets) for group, targets in groups.items()}
    settings = _settings_by_group(pruning_method, kwargs, unpruned)
    masks: dict[str, list[Tensor]] = {}
    thresholds: dict[str, float] = {}
    for group, targets in groups.items():
        method = pruning_method(**settings[group])
        if _ranks_by_dimap(method):
            count = count_to_prune(method.amount, unpruned[group], f"{CALL}: amount")
            chosen = select([t.values for t in targets], count, [t.mask for t in targets])
        else:
            chosen = _choose_flat(method, targets)
        masks[group], thresholds[group] = chosen
    empty = [
        target.label
        for group, targets in groups.items()
        for target, mask in zip(targets, masks[group])
        if mask.numel() and not mask.count_nonzero()
    ]
    warn_of_empty(empty, CALL)  # first: where warnings are errors, nothing may change
    everything = [target for targets in groups.values() for target in targets]
    readers = known_readers(target.module for target in everything)
    with all_or_nothing(everything, readers):
        for group, targets in groups.items():
            for target, mask in zip(targets, masks[group]):
                attach(target, pruning_method(**settings[group]), mask)
        for reader in readers:
            hold(reader)
    return thresholds


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
    deque(pruned_tensors(model, "remove_all()"), maxlen=0)  # all are sound, or nothing changes
    for module in reversed(list(model.modules())):  # inner ones first
        for method in pruning_methods(module):
            with torch.no_grad():
                prune.remove(module, method._tensor_name)
        release(module)
    return model


def _settings_by_group(
    pruning_method: Callable[..., prune.BasePruningMethod],
    kwargs: dict[str, Any],
    unpruned: dict[str, int],
) -> dict[str, dict[str, Any]]:
    """Return group -> arguments of its pruning method, once all are known to serve."""
    if not callable(pruning_method) or isinstance(pruning_method, prune.BasePruningMethod):
        raise TypeError(
            f"{CALL}: pruning_method must be a pruning class, such as DimapUnstructured, "
            f"found {type(pruning_method).__name__}."
        )
    if "sizes" in kwargs:
        raise TypeError(
            f"{CALL}: sizes follow from parameters here; they are for prune.global_unstructured."
        )
    settings = {group: dict(kwargs) for group in unpruned}
    if "amount" in kwargs:
        amounts = amounts_by_group(kwargs["amount"], unpruned, f"{CALL}: amount")
        settings = {group: {**kwargs, "amount": amounts[group]} for group in unpruned}
    for group in settings:
        kind = getattr(pruning_method(**settings[group]), "PRUNING_TYPE", None)
        if kind != "unstructured":
            raise TypeError(
                f"{CALL}: pruning_method must have the PRUNING_TYPE 'unstructured', found "
                f"{kind!r}: rankings of single weights cannot remove whole channels."
            )
    return settings


def _ranks_by_dimap(method: prune.BasePruningMethod) -> TypeGuard[DimapUnstructured]:
    """Tell a method that needs no flat tensor from those with a ranking of their own."""
    return type(method).compute_mask is DimapUnstructured.compute_mask


def _choose_flat(
    method: prune.BasePruningMethod, targets: list[Target]
) -> tuple[list[Tensor], float]:
    """Let any of torch's methods choose among the unpruned values of a group."""
    device = targets[0].values.device
    allowed = [
        torch.ones_like(t.orig, dtype=torch.bool) if t.mask is None else t.mask != 0
        for t in targets
    ]
    flat = torch.cat([t.values[keep].to(device) for t, keep in zip(targets, allowed)])
    kept = method.compute_mask(flat, default_mask=torch.ones_like(flat)) != 0
    for keep, part in zip(allowed, kept.split([int(keep.count_nonzero()) for keep in allowed])):
        keep[keep.clone()] = part.to(keep.device)
    pruned = flat[~kept].abs()
    return allowed, float(pruned.max()) if pruned.numel() else 0.0


def warn_of_empty(labels: list[str], caller: str) -> None:
    """Warn of layers that a call leaves without any weight."""
    if labels:
        warnings.warn(f"{caller}: no weight is left in {name_some(labels)}.", stacklevel=3)

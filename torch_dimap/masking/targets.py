"""What a pruning call is asked to change, checked in full before anything is changed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from torch_dimap.masking.grouping import Pair
from torch_dimap.masking.readers import pruning_methods
from torch_dimap.selection import check_finite

CALL = "global_module_aware_unstructured()"
SINGLE_GROUP = "all"  # what a flat iterable of pairs is called


class Target(NamedTuple):
    """One tensor to prune, as it is before the call."""

    module: nn.Module
    name: str
    label: str
    orig: nn.Parameter
    mask: Tensor | None  # None while it is unpruned
    method: prune.BasePruningMethod | None
    values: Tensor  # what to rank by: the weights, or scores in their place

    @property
    def unpruned(self) -> int:
        return self.orig.numel() if self.mask is None else int(self.mask.count_nonzero())


def check_targets(
    parameters: Mapping[str, Iterable[Pair]] | Iterable[Pair],
    importance_scores: Mapping[Pair, Tensor] | None,
) -> dict[str, list[Target]]:
    """Check all that a call was given, before anything is changed."""
    if isinstance(parameters, nn.Module) or not isinstance(parameters, Iterable):
        raise TypeError(
            f"{CALL}: parameters must be a mapping group -> (module, name) pairs, or an iterable "
            f"of pairs, found {type(parameters).__name__}: see group_parameters(model)."
        )
    if importance_scores is not None and not isinstance(importance_scores, Mapping):
        raise TypeError(
            f"{CALL}: importance_scores must be a mapping (module, name) -> tensor, "
            f"found {type(importance_scores).__name__}."
        )
    flat = not isinstance(parameters, Mapping)
    listed = parameters if isinstance(parameters, Mapping) else {SINGLE_GROUP: parameters}
    groups: dict[str, list[Target]] = {}
    for group, pairs in listed.items():
        where = "parameters" if flat else f"parameters[{group!r}]"
        if isinstance(pairs, nn.Module) or not isinstance(pairs, Iterable):
            raise TypeError(
                f"{CALL}: {where} must be an iterable of (module, name) pairs, "
                f"found {type(pairs).__name__}."
            )
        groups[group] = [
            _inspect_pair(pair, f"{where}[{i}]", importance_scores) for i, pair in enumerate(pairs)
        ]
        if not sum(target.orig.numel() for target in groups[group]):
            raise ValueError(f"{CALL}: {where} holds no weights: list some, or leave it out.")
    targets = [target for group in groups.values() for target in group]
    if not targets:
        raise ValueError(f"{CALL}: parameters is empty, found no group and no pair to prune.")
    _refuse_repeats(targets)
    known = {(target.module, target.name) for target in targets}
    surplus = [pair for pair in importance_scores or () if pair not in known]
    if surplus:
        raise ValueError(
            f"{CALL}: importance_scores must be for pairs listed in parameters, found "
            f"{len(surplus)} more: leave them out, or list their pairs."
        )
    return groups


def _inspect_pair(pair: Pair, where: str, scores: Mapping[Pair, Tensor] | None) -> Target:
    if not (
        isinstance(pair, (tuple, list))
        and len(pair) == 2
        and isinstance(pair[0], nn.Module)
        and isinstance(pair[1], str)
    ):
        raise TypeError(
            f"{CALL}: {where} must be a (module, name) pair, found {type(pair).__name__}."
        )
    module, name = pair
    label = f"{where} ({type(module).__name__}.{name})"
    methods = [method for method in pruning_methods(module) if method._tensor_name == name]
    orig, mask = module._parameters.get(f"{name}_orig"), module._buffers.get(f"{name}_mask")
    if orig is None and mask is None and not methods:
        orig = _unpruned_parameter(module, name, label)
    elif orig is None or mask is None or len(methods) != 1:
        raise RuntimeError(
            f"{CALL}: {label} was pruned before, but incompletely: expected one parameter "
            f"{name}_orig, one buffer {name}_mask and one pruning hook, found {len(methods)} "
            "hooks: build the model again and load its weights."
        )
    check_finite(orig, f"{CALL}: {label}")
    if mask is not None and mask.dtype != torch.bool and not ((mask == 0) | (mask == 1)).all():
        raise ValueError(f"{CALL}: the mask of {label} must hold 0 and 1 only: binarize it first.")
    values: Tensor = orig.detach()
    if scores is not None:
        if (module, name) not in scores:
            raise ValueError(
                f"{CALL}: importance_scores has none for {label}: "
                "give scores for every pair in parameters, or none at all."
            )
        values = scores[module, name]
        check_finite(values, f"{CALL}: importance_scores of {label}")
        if values.shape != orig.shape:
            raise ValueError(
                f"{CALL}: importance_scores of {label} must have the shape "
                f"{tuple(orig.shape)}, found {tuple(values.shape)}."
            )
        values = values.detach().to(orig.device)
    method = methods[0] if methods else None
    return Target(module, name, label, orig, mask, method, values)


def _unpruned_parameter(module: nn.Module, name: str, label: str) -> nn.Parameter:
    if parametrize.is_parametrized(module, name):
        raise ValueError(
            f"{CALL}: {label} is computed by a parametrization, not a parameter: remove that "
            "first with torch.nn.utils.parametrize.remove_parametrizations."
        )
    base = name.removesuffix("_orig")
    if base != name and f"{base}_mask" in module._buffers:
        raise ValueError(
            f"{CALL}: {label} holds the weights behind a mask: name the pruned tensor, {base!r}."
        )
    parameter = module._parameters.get(name)
    if parameter is None:
        present = [key for key, value in module._parameters.items() if value is not None]
        raise ValueError(
            f"{CALL}: {label} must be a parameter of its module, found none of that name; "
            f"there are {', '.join(present[:3]) or 'none'}"
            + (f" and {len(present) - 3} more." if len(present) > 3 else ".")
        )
    for taken in (f"{name}_orig", f"{name}_mask"):
        if hasattr(module, taken):
            raise ValueError(
                f"{CALL}: {label} needs the name {taken} for itself, but its module "
                "already has an attribute of that name: rename that."
            )
    return parameter


def _refuse_repeats(targets: list[Target]) -> None:
    seen: dict[tuple[torch.device, int], str] = {}
    for target in targets:
        if not target.orig.numel():
            continue
        first = seen.setdefault((target.orig.device, target.orig.data_ptr()), target.label)
        if first != target.label:
            raise ValueError(
                f"{CALL}: {target.label} is the same tensor as {first}: list it once."
            )

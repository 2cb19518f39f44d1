"""Pruning methods by name: which weights are ranked together, and by what."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import prune

import torch_dimap

Groups = dict[str, list[tuple[nn.Module, str]]]


def block_of(layer: str) -> str:
    """Return what stands before and in the last number: ``layers.0.blocks.1``."""
    parts = layer.split(".")
    last = max((i for i, part in enumerate(parts) if part.isdigit()), default=-1)
    return ".".join(parts[: last + 1])


# Name -> (layer's qualified name, its module group) -> the group to rank it in.
GROUPINGS: dict[str, Callable[[str, str], str]] = {
    "module": lambda layer, group: group,  # the paper's: qkv, proj, mlp
    "single": lambda layer, group: "all",
    "layer": lambda layer, group: layer,
    "block": lambda layer, group: block_of(layer),
    "stage": lambda layer, group: block_of(layer).rpartition(".")[0],
    "type": lambda layer, group: layer.rpartition(".")[2],  # qkv, proj, fc1, fc2
}

RANKINGS = {
    "dimap": torch_dimap.DimapUnstructured,
    "magnitude": prune.L1Unstructured,
    "random": prune.RandomUnstructured,
    # These three rank scores that are handed over as importance_scores:
    "gradient": prune.L1Unstructured,  # |w * dL/dw|
    "wanda": torch_dimap.DimapUnstructured,  # |w| times what comes in
    "sparsegpt": torch_dimap.DimapUnstructured,  # what the loss of w costs
}
SCORED = ("gradient", "wanda", "sparsegpt")

# Name -> (grouping, ranking). With the DIMAP score inside a single layer, magnitude decides.
METHODS = {
    "dimap": ("module", "dimap"),
    "single": ("single", "dimap"),
    "uniform": ("layer", "dimap"),
    "global": ("single", "magnitude"),
    "random": ("module", "random"),
    "gradient": ("module", "gradient"),
    "wanda": ("module", "wanda"),
    "sparsegpt": ("module", "sparsegpt"),
    "per block": ("block", "dimap"),
    "per stage": ("stage", "dimap"),
    "per type": ("type", "dimap"),
}
UNITS = "units"  # whole attention heads and MLP neurons, each kind ranked among itself


def regroup(model: nn.Module, grouping: str) -> Groups:
    """Return the model's prunable weights in the groups of a ``GROUPINGS`` name."""
    names = {module: name for name, module in model.named_modules()}
    groups: Groups = {}
    for group, pairs in torch_dimap.group_parameters(model).items():
        for pair in pairs:
            groups.setdefault(GROUPINGS[grouping](names[pair[0]], group), []).append(pair)
    return groups


def prunable(model: nn.Module, method: str) -> tuple[Any, type[prune.BasePruningMethod]]:
    """Return what a method prunes, by group, and the class that ranks it."""
    if method == UNITS:
        return torch_dimap.group_units(model), torch_dimap.DimapUnstructured
    grouping, ranking = METHODS[method]
    return regroup(model, grouping), RANKINGS[ranking]


def masks(model: nn.Module) -> dict[str, Tensor]:
    """Return the masks of a model's weights by name."""
    weights = dict(model.named_parameters())
    return {
        name: buffer
        for name, buffer in model.named_buffers()
        if f"{name.removesuffix('_mask')}_orig" in weights  # Swin has an attn_mask of its own
    }


def prune_to(
    model: nn.Module,
    method: str,
    amount: float,
    importance_scores: Mapping[tuple[nn.Module, str], Tensor] | None = None,
) -> dict[str, float]:
    """Prune until the share ``amount`` of each group is gone, counting what went before.

    By ``UNITS`` it is the share of all heads and of all neurons, and whole units are masked.
    """
    if method == UNITS:
        return mask_units_to(model, amount)
    groups, ranking = prunable(model, method)
    counts = {}
    for group, pairs in groups.items():
        total = sum(getattr(module, name).numel() for module, name in pairs)
        masks = [getattr(module, f"{name}_mask", None) for module, name in pairs]
        gone = sum(int((mask == 0).sum()) for mask in masks if mask is not None)
        counts[group] = max(0, round(amount * total) - gone)
    return torch_dimap.global_module_aware_unstructured(
        groups, ranking, importance_scores, amount=counts
    )


def mask_units_to(model: nn.Module, amount: float) -> dict[str, float]:
    """Mask heads and neurons until the share ``amount`` of each kind is gone."""
    groups = torch_dimap.group_units(model)
    counts = {}
    for group, layers in groups.items():
        left = sum(int(layer.unmasked().count_nonzero()) for layer in layers)
        gone = sum(layer.units for layer in layers) - left
        counts[group] = max(0, round(amount * (left + gone)) - gone)
    done = torch_dimap.global_module_aware_structured(groups, counts)
    return {group: kept.threshold for group, kept in done.items()}

"""Pruning methods by name: which weights are ranked together, and by what."""

from __future__ import annotations

from collections.abc import Callable, Mapping

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


def regroup(model: nn.Module, grouping: str) -> Groups:
    """Return the model's prunable weights in the groups of a ``GROUPINGS`` name."""
    names = {module: name for name, module in model.named_modules()}
    groups: Groups = {}
    for group, pairs in torch_dimap.group_parameters(model).items():
        for pair in pairs:
            groups.setdefault(GROUPINGS[grouping](names[pair[0]], group), []).append(pair)
    return groups


def prune_to(
    model: nn.Module,
    method: str,
    amount: float,
    importance_scores: Mapping[tuple[nn.Module, str], Tensor] | None = None,
) -> dict[str, float]:
    """Prune until the share ``amount`` of each group is gone, counting what went before."""
    grouping, ranking = METHODS[method]
    groups = regroup(model, grouping)
    counts = {}
    for group, pairs in groups.items():
        total = sum(getattr(module, name).numel() for module, name in pairs)
        masks = [getattr(module, f"{name}_mask", None) for module, name in pairs]
        gone = sum(int((mask == 0).sum()) for mask in masks if mask is not None)
        counts[group] = max(0, round(amount * total) - gone)
    return torch_dimap.global_module_aware_unstructured(
        groups, RANKINGS[ranking], importance_scores, amount=counts
    )


def cubic_schedule(amount: float, rounds: int) -> list[float]:
    """Return the share that is gone after each round, rising to ``amount``.

    Source: Zhu and Gupta, "To prune, or not to prune", 2017, arXiv 1710.01878, Eq. 1.
    """
    return [
        amount if i == rounds else amount * (1 - (1 - i / rounds) ** 3)
        for i in range(1, rounds + 1)
    ]

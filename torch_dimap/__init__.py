"""Data-independent module-aware pruning (DIMAP) for hierarchical vision transformers.

A plug-in to :mod:`torch.nn.utils.prune`: group a model's weights with
:func:`group_parameters`, prune them with :func:`global_module_aware_unstructured`,
look at the result with :func:`summarize`, save it with :func:`save_pruned`, and make it
permanent with :func:`remove_all`. :func:`prune_checkpoint` does it to a file alone.
Whole heads and neurons: :func:`group_units`, :func:`global_module_aware_structured`,
:func:`remove_units`. What learns to choose is in :mod:`torch_dimap.learning`.
"""

import importlib
from typing import TYPE_CHECKING, Any

from torch_dimap.accounting import (
    FlopCount,
    Flops,
    Summary,
    count_flops,
    plot_density,
    plot_histograms,
    plot_masks,
    plot_units,
    summarize,
)
from torch_dimap.budgets import (
    Budget,
    LatencyBudget,
    UnitBudget,
    prune_to_flops,
    prune_to_parameters,
    prune_units_to_flops,
    prune_units_to_latency,
)
from torch_dimap.files import (
    expand_checkpoint,
    load_pruned,
    prune_checkpoint,
    prune_like,
    save_pruned,
)
from torch_dimap.integrations import PruningSchedule
from torch_dimap.masking import (
    DimapUnstructured,
    builtin_rule,
    dimap_unstructured,
    global_module_aware_unstructured,
    group_parameters,
    hold_masks,
    remove_all,
)
from torch_dimap.reconstruction import reconstruct, sparsegpt_scores, wanda_scores
from torch_dimap.selection import dimap_scores
from torch_dimap.units import global_module_aware_structured, group_units, remove_units

if TYPE_CHECKING:
    from torch_dimap import learning

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name == "learning":  # imported when it is first asked for
        return importlib.import_module("torch_dimap.learning")
    raise AttributeError(f"module 'torch_dimap' has no attribute {name!r}")


__all__ = [
    "Budget",
    "DimapUnstructured",
    "FlopCount",
    "Flops",
    "LatencyBudget",
    "PruningSchedule",
    "Summary",
    "UnitBudget",
    "__version__",
    "builtin_rule",
    "count_flops",
    "dimap_scores",
    "dimap_unstructured",
    "expand_checkpoint",
    "global_module_aware_structured",
    "global_module_aware_unstructured",
    "group_parameters",
    "group_units",
    "hold_masks",
    "learning",
    "load_pruned",
    "plot_density",
    "plot_histograms",
    "plot_masks",
    "plot_units",
    "prune_checkpoint",
    "prune_like",
    "prune_to_flops",
    "prune_to_parameters",
    "prune_units_to_flops",
    "prune_units_to_latency",
    "reconstruct",
    "remove_all",
    "remove_units",
    "save_pruned",
    "sparsegpt_scores",
    "summarize",
    "wanda_scores",
]

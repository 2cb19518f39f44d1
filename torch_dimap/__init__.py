"""Data-independent module-aware pruning (DIMAP) for hierarchical vision transformers.

A plug-in to :mod:`torch.nn.utils.prune`: group a model's weights with
:func:`group_parameters`, prune them with :func:`global_module_aware_unstructured`,
look at the result with :func:`summarize`, save it with :func:`save_pruned`, and make it
permanent with :func:`remove_all`. :func:`prune_checkpoint` does it to a file alone.
"""

from torch_dimap.budgets import Budget, prune_to_flops, prune_to_parameters
from torch_dimap.checkpoint import load_pruned, save_pruned
from torch_dimap.flops import FlopCount, Flops, count_flops
from torch_dimap.grouping import builtin_rule, group_parameters
from torch_dimap.hooks import hold_masks
from torch_dimap.importance import dimap_scores
from torch_dimap.plots import plot_density, plot_histograms, plot_masks
from torch_dimap.pruning import (
    DimapUnstructured,
    dimap_unstructured,
    global_module_aware_unstructured,
    remove_all,
)
from torch_dimap.streaming import expand_checkpoint, prune_checkpoint
from torch_dimap.summary import Summary, summarize

__version__ = "0.1.0"

__all__ = [
    "Budget",
    "DimapUnstructured",
    "FlopCount",
    "Flops",
    "Summary",
    "__version__",
    "builtin_rule",
    "count_flops",
    "dimap_scores",
    "dimap_unstructured",
    "expand_checkpoint",
    "global_module_aware_unstructured",
    "group_parameters",
    "hold_masks",
    "load_pruned",
    "plot_density",
    "plot_histograms",
    "plot_masks",
    "prune_checkpoint",
    "prune_to_flops",
    "prune_to_parameters",
    "remove_all",
    "save_pruned",
    "summarize",
]

"""Data-independent module-aware pruning (DIMAP) for hierarchical vision transformers.

A plug-in to :mod:`torch.nn.utils.prune`: group a model's weights with
:func:`group_parameters`, prune them with :func:`global_module_aware_unstructured`,
look at the result with :func:`summarize`, save it with :func:`save_pruned`, and make it
permanent with :func:`remove_all`. :func:`prune_checkpoint` does it to a file alone.
"""

from torch_dimap.accounting import (
    Budget,
    FlopCount,
    Flops,
    Summary,
    count_flops,
    plot_density,
    plot_histograms,
    plot_masks,
    prune_to_flops,
    prune_to_parameters,
    summarize,
)
from torch_dimap.files import (
    expand_checkpoint,
    load_pruned,
    prune_checkpoint,
    save_pruned,
)
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
    "reconstruct",
    "remove_all",
    "save_pruned",
    "sparsegpt_scores",
    "summarize",
    "wanda_scores",
]

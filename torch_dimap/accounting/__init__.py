"""What is left, what does it cost, how does it look?"""

from torch_dimap.accounting.budgets import Budget, prune_to_flops, prune_to_parameters
from torch_dimap.accounting.flops import FlopCount, Flops, count_flops
from torch_dimap.accounting.plots import (
    plot_density,
    plot_histograms,
    plot_masks,
    plot_units,
)
from torch_dimap.accounting.summary import Summary, summarize
from torch_dimap.accounting.thresholds import check_thresholds

__all__ = [
    "Budget",
    "FlopCount",
    "Flops",
    "Summary",
    "check_thresholds",
    "count_flops",
    "plot_density",
    "plot_histograms",
    "plot_masks",
    "plot_units",
    "prune_to_flops",
    "prune_to_parameters",
    "summarize",
]

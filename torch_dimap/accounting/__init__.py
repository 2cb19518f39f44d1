"""What is left, what does it cost, how does it look?"""

from torch_dimap.accounting.budgets import Budget, prune_to_flops, prune_to_parameters
from torch_dimap.accounting.flops import FlopCount, Flops, count_flops
from torch_dimap.accounting.latency import LatencyBudget, prune_units_to_latency
from torch_dimap.accounting.plots import (
    plot_density,
    plot_histograms,
    plot_masks,
    plot_units,
)
from torch_dimap.accounting.summary import Summary, summarize
from torch_dimap.accounting.thresholds import check_thresholds
from torch_dimap.accounting.unit_budgets import UnitBudget, prune_units_to_flops
from torch_dimap.accounting.unit_flops import count_unit_flops

__all__ = [
    "Budget",
    "FlopCount",
    "Flops",
    "LatencyBudget",
    "Summary",
    "UnitBudget",
    "check_thresholds",
    "count_flops",
    "count_unit_flops",
    "plot_density",
    "plot_histograms",
    "plot_masks",
    "plot_units",
    "prune_to_flops",
    "prune_to_parameters",
    "prune_units_to_flops",
    "prune_units_to_latency",
    "summarize",
]

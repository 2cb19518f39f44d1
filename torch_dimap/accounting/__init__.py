"""What is left, what does it cost, how does it look?"""

from torch_dimap.accounting.flops import FlopCount, Flops, count_flops, weigh, weighted_flops
from torch_dimap.accounting.inputs import Inputs, arguments_for
from torch_dimap.accounting.plots import plot_density, plot_histograms, plot_masks, plot_units
from torch_dimap.accounting.summary import Summary, summarize
from torch_dimap.accounting.thresholds import check_thresholds
from torch_dimap.accounting.unit_flops import count_savings, count_unit_flops, names_in, slim_copy

__all__ = [
    "FlopCount",
    "Flops",
    "Inputs",
    "Summary",
    "arguments_for",
    "check_thresholds",
    "count_flops",
    "count_savings",
    "count_unit_flops",
    "names_in",
    "plot_density",
    "plot_histograms",
    "plot_masks",
    "plot_units",
    "slim_copy",
    "summarize",
    "weigh",
    "weighted_flops",
]

"""Who holds which part of a sharded weight, and how do those processes agree?"""

from torch_dimap.sharding.fsdp import (
    casts_inputs,
    gathered,
    gathering_methods,
    gathers,
    managed_names,
    rename,
    rest_sharded,
    spread_by_plan,
    tied_names,
)
from torch_dimap.sharding.layout import (
    Layout,
    is_sharded,
    laid_out,
    layout_of,
    local_of,
    part_like,
    spread,
    whole_of,
)
from torch_dimap.sharding.lending import Whole, lend_to_first
from torch_dimap.sharding.processes import Processes, agree, processes_of, refuse_everywhere
from torch_dimap.sharding.replicas import refuse_unlike_replicas

__all__ = [
    "Layout",
    "Processes",
    "Whole",
    "agree",
    "casts_inputs",
    "gathered",
    "gathering_methods",
    "gathers",
    "is_sharded",
    "laid_out",
    "layout_of",
    "lend_to_first",
    "local_of",
    "managed_names",
    "part_like",
    "processes_of",
    "refuse_everywhere",
    "refuse_unlike_replicas",
    "rename",
    "rest_sharded",
    "spread",
    "spread_by_plan",
    "tied_names",
    "whole_of",
]

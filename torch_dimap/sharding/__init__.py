"""Who holds which part of a sharded weight, and how do those processes agree?"""

from torch_dimap.sharding.fsdp import gathered, gathers, managed_names, rename, rest_sharded
from torch_dimap.sharding.layout import (
    Layout,
    is_sharded,
    laid_out,
    layout_of,
    local_of,
    spread,
    whole_of,
)
from torch_dimap.sharding.processes import Processes, agree, processes_of

__all__ = [
    "Layout",
    "Processes",
    "agree",
    "gathered",
    "gathers",
    "is_sharded",
    "laid_out",
    "layout_of",
    "local_of",
    "managed_names",
    "processes_of",
    "rename",
    "rest_sharded",
    "spread",
    "whole_of",
]

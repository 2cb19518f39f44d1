"""Which units does training choose? Gates that learn, under a cost that is held."""

from torch_dimap.learning.gates import Gates, gated, straight_through
from torch_dimap.learning.held_cost import HeldCost, stands_still
from torch_dimap.learning.single_path import SinglePath, SinglePathSearch, apply_single_path
from torch_dimap.learning.single_path_costs import single_path_flops
from torch_dimap.operations import collapse_convolutions, replace_attentions

__all__ = [
    "Gates",
    "HeldCost",
    "SinglePath",
    "SinglePathSearch",
    "apply_single_path",
    "collapse_convolutions",
    "gated",
    "replace_attentions",
    "single_path_flops",
    "stands_still",
    "straight_through",
]

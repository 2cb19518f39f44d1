"""Which units does training choose? Gates that learn, under a cost that is held."""

from torch_dimap.learning.class_masks import ClassMasks
from torch_dimap.learning.gates import Gates, gated, straight_through
from torch_dimap.learning.held_cost import HeldCost, stands_still
from torch_dimap.learning.joined import Joined
from torch_dimap.learning.layer_rates import LayerRates
from torch_dimap.learning.percentiles import KeptShare, prune_units_by_percentile
from torch_dimap.learning.single_path import SinglePathSearch
from torch_dimap.learning.single_path_choices import SinglePath, apply_single_path
from torch_dimap.learning.single_path_costs import single_path_flops
from torch_dimap.operations import collapse_convolutions, replace_attentions, replaced_attentions

__all__ = [
    "ClassMasks",
    "Gates",
    "HeldCost",
    "Joined",
    "KeptShare",
    "LayerRates",
    "SinglePath",
    "SinglePathSearch",
    "apply_single_path",
    "collapse_convolutions",
    "gated",
    "prune_units_by_percentile",
    "replace_attentions",
    "replaced_attentions",
    "single_path_flops",
    "stands_still",
    "straight_through",
]

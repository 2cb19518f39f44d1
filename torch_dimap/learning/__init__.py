"""Which units does training choose? Gates that learn, under a cost that is held."""

from torch_dimap.learning.class_masks import ClassMasks
from torch_dimap.learning.gates import Gates, gated, straight_through
from torch_dimap.learning.held_cost import HeldCost, stands_still
from torch_dimap.learning.joined import Joined
from torch_dimap.learning.layer_rates import LayerRates
from torch_dimap.learning.percentiles import KeptShare, prune_units_by_percentile

__all__ = [
    "ClassMasks",
    "Gates",
    "HeldCost",
    "Joined",
    "KeptShare",
    "LayerRates",
    "gated",
    "prune_units_by_percentile",
    "stands_still",
    "straight_through",
]

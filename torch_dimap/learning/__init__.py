"""Which units does training choose? Gates that learn, under a cost that is held."""

from torch_dimap.learning.gates import Gates, gated, straight_through
from torch_dimap.learning.held_cost import HeldCost, stands_still

__all__ = ["Gates", "HeldCost", "gated", "stands_still", "straight_through"]

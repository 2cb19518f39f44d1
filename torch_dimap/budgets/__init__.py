"""How much must go to meet a cost? The smallest amount, by weights, by units, by the clock."""

from torch_dimap.budgets.latency import LatencyBudget, prune_units_to_latency
from torch_dimap.budgets.unit_budgets import UnitBudget, prune_units_to_flops
from torch_dimap.budgets.weight_budgets import Budget, prune_to_flops, prune_to_parameters

__all__ = [
    "Budget",
    "LatencyBudget",
    "UnitBudget",
    "prune_to_flops",
    "prune_to_parameters",
    "prune_units_to_flops",
    "prune_units_to_latency",
]

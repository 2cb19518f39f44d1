"""Whose weights, and how does a mask hold? Groups, checks, and torch's own hooks."""

from torch_dimap.masking.amounts import amounts_by_group, check_amount, count_to_prune
from torch_dimap.masking.attaching import all_or_nothing, attach
from torch_dimap.masking.grouping import Pair, Rule, builtin_rule, group_parameters
from torch_dimap.masking.pruning import (
    DimapUnstructured,
    dimap_unstructured,
    global_module_aware_unstructured,
    remove_all,
    warn_of_empty,
)
from torch_dimap.masking.readers import hold_masks, pruned_tensors, pruning_methods
from torch_dimap.masking.targets import SINGLE_GROUP, Target, check_targets

__all__ = [
    "SINGLE_GROUP",
    "DimapUnstructured",
    "Pair",
    "Rule",
    "Target",
    "all_or_nothing",
    "amounts_by_group",
    "attach",
    "builtin_rule",
    "check_amount",
    "check_targets",
    "count_to_prune",
    "dimap_unstructured",
    "global_module_aware_unstructured",
    "group_parameters",
    "hold_masks",
    "pruned_tensors",
    "pruning_methods",
    "remove_all",
    "warn_of_empty",
]

"""Whose weights, and how does a mask hold? Groups, checks, and torch's own hooks."""

from torch_dimap.masking.amounts import amounts_by_group, check_amount, count_to_prune, warn_of_few
from torch_dimap.masking.attaching import all_or_nothing, attach, bake, show_masked, snapshot
from torch_dimap.masking.checked import listed
from torch_dimap.masking.choice import choose_masks, left_of, unpruned_by_group
from torch_dimap.masking.grouping import Rule, builtin_rule, group_parameters, unwrapped_name
from torch_dimap.masking.layers import (
    BEFORE_SHARDING,
    Layer,
    Pair,
    computed_by,
    count_nonzero,
    pruned_tensors,
    pruning_methods,
    refuse_sharded,
    refuse_sharded_model,
)
from torch_dimap.masking.method import DimapUnstructured
from torch_dimap.masking.pruning import (
    dimap_unstructured,
    global_module_aware_unstructured,
    prune_layers,
    remove_all,
)
from torch_dimap.masking.readers import (
    Place,
    hold,
    hold_masks,
    is_never_called,
    known_readers,
    note_readers,
    release,
    survey,
)
from torch_dimap.masking.targets import (
    SINGLE_GROUP,
    Parameters,
    check_layer,
    find_layers,
    find_layers_here,
    find_layers_in,
    refuse_taken_names,
)
from torch_dimap.masking.trials import drop_hooks_of_shards, stand_in_for_shards, untouched
from torch_dimap.masking.values import Scores, check_values

__all__ = [
    "BEFORE_SHARDING",
    "SINGLE_GROUP",
    "DimapUnstructured",
    "Layer",
    "Pair",
    "Parameters",
    "Place",
    "Rule",
    "Scores",
    "all_or_nothing",
    "amounts_by_group",
    "attach",
    "bake",
    "builtin_rule",
    "check_amount",
    "check_layer",
    "check_values",
    "choose_masks",
    "computed_by",
    "count_nonzero",
    "count_to_prune",
    "dimap_unstructured",
    "drop_hooks_of_shards",
    "find_layers",
    "find_layers_here",
    "find_layers_in",
    "global_module_aware_unstructured",
    "group_parameters",
    "hold",
    "hold_masks",
    "is_never_called",
    "known_readers",
    "left_of",
    "listed",
    "note_readers",
    "prune_layers",
    "pruned_tensors",
    "pruning_methods",
    "refuse_sharded",
    "refuse_sharded_model",
    "refuse_taken_names",
    "release",
    "remove_all",
    "show_masked",
    "snapshot",
    "stand_in_for_shards",
    "survey",
    "untouched",
    "unpruned_by_group",
    "unwrapped_name",
    "warn_of_few",
]

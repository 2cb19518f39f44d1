"""How does a pruned model get to disk and back?"""

from torch_dimap.files.entries import read_values
from torch_dimap.files.inspecting import inspect_checkpoint
from torch_dimap.files.loading import load_pruned
from torch_dimap.files.readying import prune_like
from torch_dimap.files.replacing import check_target
from torch_dimap.files.saving import save_pruned
from torch_dimap.files.skeletons import group_names, skeleton
from torch_dimap.files.stored import open_weights, refuse_masks_alone
from torch_dimap.files.streaming import expand_checkpoint, prune_checkpoint

__all__ = [
    "check_target",
    "expand_checkpoint",
    "group_names",
    "inspect_checkpoint",
    "load_pruned",
    "open_weights",
    "prune_checkpoint",
    "prune_like",
    "read_values",
    "refuse_masks_alone",
    "save_pruned",
    "skeleton",
]

"""How does a pruned model get to disk and back?"""

from torch_dimap.files.inspecting import inspect_checkpoint
from torch_dimap.files.loading import load_pruned
from torch_dimap.files.readying import prune_like
from torch_dimap.files.saving import save_pruned
from torch_dimap.files.skeletons import group_names, skeleton
from torch_dimap.files.streaming import expand_checkpoint, prune_checkpoint

__all__ = [
    "expand_checkpoint",
    "group_names",
    "inspect_checkpoint",
    "load_pruned",
    "prune_checkpoint",
    "prune_like",
    "save_pruned",
    "skeleton",
]

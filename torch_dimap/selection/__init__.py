"""Which entries go, for an exact count? Tensors only; nothing here knows a model."""

from torch_dimap.selection.cuts import Cut, apply_cut
from torch_dimap.selection.importance import check_finite, dimap_scores
from torch_dimap.selection.reading import (
    CPU_BLOCK,
    Blocks,
    FlatLayer,
    blocks_of,
    read_layer,
)
from torch_dimap.selection.search import find_cuts, select
from torch_dimap.selection.threads import each_layer, thrifty

__all__ = [
    "CPU_BLOCK",
    "Blocks",
    "Cut",
    "FlatLayer",
    "apply_cut",
    "blocks_of",
    "check_finite",
    "dimap_scores",
    "each_layer",
    "find_cuts",
    "read_layer",
    "select",
    "thrifty",
]

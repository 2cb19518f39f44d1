"""Which entries go, for an exact count? Tensors only; nothing here knows a model."""

from torch_dimap.selection.cuts import Cut, apply_cut
from torch_dimap.selection.importance import check_finite, check_rankable, dimap_scores
from torch_dimap.selection.narrowing import find_cuts_sparingly
from torch_dimap.selection.reading import CPU_BLOCK, Blocks, FlatWeight, blocks_of, read_weight
from torch_dimap.selection.search import select
from torch_dimap.selection.threads import Map, threaded_map, thrifty

__all__ = [
    "CPU_BLOCK",
    "Blocks",
    "Cut",
    "FlatWeight",
    "Map",
    "apply_cut",
    "blocks_of",
    "check_finite",
    "check_rankable",
    "dimap_scores",
    "find_cuts_sparingly",
    "read_weight",
    "select",
    "threaded_map",
    "thrifty",
]

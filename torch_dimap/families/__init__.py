"""Where do known attentions and MLPs keep their heads and neurons, and what computes without?"""

from torch_dimap.families.attentions import ATTENTIONS, REFUSED, SHARED
from torch_dimap.families.mlps import MLPS
from torch_dimap.families.rows import Row
from torch_dimap.families.slimming import is_ours, original_class, slim_class

__all__ = [
    "ATTENTIONS",
    "MLPS",
    "REFUSED",
    "SHARED",
    "Row",
    "is_ours",
    "original_class",
    "slim_class",
]

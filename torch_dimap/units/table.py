"""Which classes have units, and where: one row per attention or MLP class."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from torch_dimap.units.description import HEADS, NEURONS
from torch_dimap.units.forwards import NoHeads, NoNeurons


class Row(NamedTuple):
    """Where a module keeps its units: paths below the module, to layers or to tensors."""

    makes: dict[str, int]  # whose rows make the units -> how many blocks of them
    reader: str  # whose columns take the units in
    number: str = ""  # path to the attribute that counts the units; "": the reader's columns
    counts: tuple[str, ...] = ()  # further attributes that are the number of units
    widths: tuple[str, ...] = ()  # attributes that are the number of all their entries
    along: dict[str, int] = {}  # what else goes with its unit -> the dimension
    mixed: tuple[str, ...] = ()  # what mixes units unless it is nn.Identity or None
    forward: type[nn.Module] | None = None
    empty: type[nn.Module] | None = None


_VIT = Row(
    {"qkv": 3, "gate": 1}, "proj", "num_heads", widths=("attn_dim",), mixed=("norm",),
    empty=NoHeads,
)  # fmt: skip
_MLP = Row({"fc1": 1}, "fc2", mixed=("norm",), empty=NoNeurons)

# Kind -> class whose forward the module runs -> row. A class that is not here has no units.
ROWS: dict[str, dict[str, Row]] = {
    HEADS: {
        "timm.layers.attention.Attention": _VIT,
        "timm.models.swin_transformer.WindowAttention": Row(
            {"qkv": 3}, "proj", "num_heads", along={"relative_position_bias_table": 1},
            empty=NoHeads,
        ),
    },
    NEURONS: {
        "timm.layers.mlp.Mlp": _MLP,
    },
}  # fmt: skip

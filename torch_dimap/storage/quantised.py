"""Weights that are stored as codes, with scales beside them: told, and refused."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch_dimap.storage.entries import Entry
from torch_dimap.text import name_some

# What GPTQ and AWQ, bitsandbytes, compressed-tensors and torch.ao put beside quantised weights.
_OF_QUANTISED = re.compile(
    r"(^|\.)(qweight|qzeros|SCB|\w*weight_(scale|zero_point|packed|scale_inv)|_packed_params\.\w+)$"
    r"|\.weight\.(absmax|quant_map|quant_state\.\w+)$"
)


def refuse_quantised(entries: Mapping[str, Entry], where: str) -> None:
    """Raise for weights that are stored as codes, with scales beside them."""
    signs = [name for name in entries if _OF_QUANTISED.search(name)]
    codes = [
        name
        for name, entry in entries.items()
        if name.endswith("weight") and not (entry.kind.dtype.is_floating_point or entry.masked)
    ]
    if signs or codes:
        raise ValueError(
            f"{where} must hold weights as they are computed with, found a quantised checkpoint "
            f"({name_some(codes or signs)}): prune the model it was made from, bake it with "
            "remove_all, and quantise that."
        )

"""What may stand in an attention's place? Convolutions made of its weights, or nothing."""

from torch_dimap.operations.modules import (
    TAPS,
    Operation,
    PlainConvolution,
    SharedConvolution,
    Skip,
    on_map,
    refuse_mask,
)
from torch_dimap.operations.replacing import (
    OPERATIONS,
    check_positive,
    collapse_convolutions,
    default_temperature,
    plain_operation,
    put,
    replace_attentions,
    replaced_attentions,
)
from torch_dimap.operations.sites import Site, find_sites
from torch_dimap.operations.weights import convolve, head_shares, mix_heads

__all__ = [
    "OPERATIONS",
    "TAPS",
    "Operation",
    "PlainConvolution",
    "SharedConvolution",
    "Site",
    "Skip",
    "check_positive",
    "collapse_convolutions",
    "convolve",
    "default_temperature",
    "find_sites",
    "head_shares",
    "mix_heads",
    "on_map",
    "plain_operation",
    "put",
    "refuse_mask",
    "replace_attentions",
    "replaced_attentions",
]

"""What a magnitude cut leaves of a layer: its mask, block by block."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from itertools import repeat
from typing import NamedTuple

import torch
from torch import Tensor

from torch_dimap.selection.reading import Blocks, block_size, magnitude_of


class Cut(NamedTuple):
    """What stays of a layer: all above ``magnitude``, and the first ``ties`` equal to it."""

    magnitude: float
    ties: int
    kept: int  # how many these are


def apply_cut(
    blocks: Iterable[tuple[Tensor, Tensor | None]],
    cut: Cut,
    outs: Iterable[Tensor | None] = repeat(None),
) -> Iterator[Tensor]:
    """Yield the mask of each block, True for what stays; written to ``outs`` if given."""
    ties = cut.ties
    for block, out in zip(blocks, outs):
        magnitude = magnitude_of(*block)
        keep = torch.gt(magnitude, cut.magnitude, out=out)
        if ties:
            tied = (magnitude == cut.magnitude).nonzero().squeeze(1)[:ties]
            keep[tied] = True
            ties -= tied.numel()
        yield keep


def mask_of(weight: Tensor, blocks: Blocks, cut: Cut) -> Tensor:
    """Return the mask of a whole tensor in memory, whose blocks are given."""
    keep = torch.empty(weight.numel(), dtype=torch.bool, device=weight.device)
    deque(apply_cut(blocks(), cut, keep.split(block_size(keep))), maxlen=0)
    return keep.view(weight.shape)

"""What a magnitude cut leaves of a weight: its mask, block by block."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import repeat
from typing import NamedTuple

import torch
from torch import Tensor

from torch_dimap.selection.reading import (
    Blocks,
    Scratch,
    block_size,
    equal,
    larger,
)


class Cut(NamedTuple):
    """What stays of a weight: all above ``magnitude``, and the first ``ties`` equal to it."""

    magnitude: float  # -1.0 if all stays
    ties: int
    kept: int  # how many these are


def apply_cut(
    blocks: Iterable[tuple[Tensor, Tensor | None]],
    cut: Cut,
    outs: Iterable[Tensor | None] = repeat(None),
) -> Iterator[Tensor]:
    """Yield the mask of each block, True for what stays; written to ``outs`` if given."""
    ties, scratch = cut.ties, Scratch()
    for block, out in zip(blocks, outs):
        keep = larger(*block, cut.magnitude, scratch, out)
        if ties:
            tied = equal(*block, cut.magnitude, scratch)[:ties]
            keep[tied] = True
            ties -= tied.numel()
        yield keep


def mask_of(weight: Tensor, blocks: Blocks, cut: Cut) -> Tensor:
    """Return the mask of a whole tensor in memory, whose blocks are given."""
    keep = torch.empty(weight.numel(), dtype=torch.bool, device=weight.device)
    for _ in apply_cut(blocks(), cut, keep.split(block_size(keep))):
        pass
    return keep.view(weight.shape)

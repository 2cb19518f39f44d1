"""One tensor of a state dict, read block by block, in memory or in a file."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from torch_dimap.selection import Blocks, blocks_of
from torch_dimap.sharding import local_of
from torch_dimap.storage.headers import Kind
from torch_dimap.storage.packing import bits_of, zeroed


class Entry(NamedTuple):
    """One tensor of a state dict, dense or behind a mask.

    Attributes:
        kind: its dtype and shape; the mask's shape is the same.
        blocks: reads it: flat values, and the mask or None. In a file of masks alone the
            mask stands in for the values.
        masked: whether there is a mask.
        baked: whether all that it does not keep is +0.0 already.
        kept: how many entries the mask keeps, where that is known without reading it.
        memory: the same for tensors that share their memory.
    """

    kind: Kind
    blocks: Blocks
    masked: bool = False
    baked: bool = False
    kept: int | None = None
    memory: object = None


def entry_of(tensor: Tensor, read: Callable[[], Tensor] | None = None) -> Entry:
    """Make an entry of a tensor in memory, on any device; of a sharded one with what reads it."""
    kind = Kind(tensor.dtype, tuple(tensor.shape))
    own = local_of(tensor)
    place = (tensor.device, own.data_ptr(), kind, tensor.stride())
    memory = place if own.numel() else None
    return Entry(kind, lambda: blocks_of((read() if read else tensor).cpu(), None)(), memory=memory)


def masked(values: Entry, mask: Entry) -> Entry:
    """Put a mask, not zero where values are kept, on an entry."""

    def blocks() -> Iterator[tuple[Tensor, Tensor]]:
        for (weight, _), (flags, _) in zip(values.blocks(), mask.blocks()):
            # A file's booleans may be bytes beyond 1, which torch does not expect.
            yield weight, (flags.view(torch.uint8) if flags.dtype == torch.bool else flags) != 0

    return values._replace(blocks=blocks, masked=True)


def count_kept(entry: Entry) -> int:
    """Count what an entry's mask keeps."""
    if entry.kept is not None:
        return entry.kept
    return sum(int(keep.count_nonzero()) for _, keep in entry.blocks() if keep is not None)


def join_masks(entries: dict[str, Entry], where: str) -> dict[str, Entry]:
    """Make one entry of a pruned tensor's original and mask, as torch's state dicts have them."""
    joined = {}
    for name, entry in entries.items():
        if name.endswith("_mask") and f"{name.removesuffix('_mask')}_orig" in entries:
            continue
        base = name.removesuffix("_orig")
        mask = entries.get(f"{base}_mask") if base != name else None
        if mask is not None and mask.kind.shape != entry.kind.shape:
            raise ValueError(f"{where}: {base!r} must have a mask of its own shape.")
        if mask is not None and not _holds_flags(mask):
            raise ValueError(
                f"{where}: the mask of {base!r} must be of 0 and 1, found other values, which "
                "would scale its weights: multiply them in, and save the product as the tensor."
            )
        joined[name if mask is None else base] = entry if mask is None else masked(entry, mask)
    return joined


def _holds_flags(mask: Entry) -> bool:
    """Tell whether a mask only keeps or takes away; of booleans there is no doubt."""
    if mask.kind.dtype == torch.bool:
        return True
    return all(bool(((flags == 0) | (flags == 1)).all()) for flags, _ in mask.blocks())


def fill(entry: Entry, values: Tensor) -> None:
    """Read a tensor into contiguous memory of its dtype, +0.0 where a mask does not keep it."""
    values, place = values.detach().view(-1), 0
    for weight, keep in entry.blocks():
        part = slice(place, place := place + weight.numel())
        bits = bits_of(weight) if keep is None or entry.baked else zeroed(weight, keep)
        bits_of(values[part])[:] = bits


def read_values(entry: Entry) -> Tensor:
    """Read a whole tensor, +0.0 where a mask does not keep it."""
    values = torch.empty(entry.kind.shape, dtype=entry.kind.dtype)
    fill(entry, values)
    return values


def read_mask(entry: Entry) -> Tensor:
    """Read the mask of a masked entry."""
    blocks = [keep for _, keep in entry.blocks() if keep is not None]
    return torch.cat(blocks).view(entry.kind.shape)

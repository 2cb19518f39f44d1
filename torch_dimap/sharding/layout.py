"""Which part of a sharded weight this process holds: DTensors of fully_shard and of plans."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, NamedTuple, TypeGuard

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_sharded(tensor: object) -> TypeGuard[DTensor]:
    """Tell a DTensor from a plain tensor, without the import that this takes."""
    module = sys.modules.get("torch.distributed.tensor")
    kind = getattr(module, "DTensor", None)  # torch 2.4 has it elsewhere, and it is refused there
    return kind is not None and isinstance(tensor, kind)


def local_of(tensor: Tensor) -> Tensor:
    """Return the part of a tensor that this process holds, without a graph."""
    if not is_sharded(tensor):
        return tensor.detach()
    with torch.no_grad():  # to detach it first would take torch ten times as long
        return tensor.to_local()


class Layout(NamedTuple):
    """Where the entries of a part lie in the whole tensor."""

    shape: tuple[int, ...]  # of the whole
    indices: tuple[np.ndarray, ...]  # for each dimension those that are here, ascending
    counts: bool  # in a sum over all processes: False where another one holds the same part

    @property
    def size(self) -> int:
        return int(np.prod(self.shape))

    def of(self, entries: np.ndarray) -> np.ndarray:
        """Return the places in the whole of places in the part, both flat and ascending."""
        here = tuple(len(index) for index in self.indices)
        if not entries.size:
            return entries
        places = np.unravel_index(entries, here)
        whole = tuple(index[place] for index, place in zip(self.indices, places))
        return np.ravel_multi_index(whole, self.shape)

    def part_of(self, whole: Tensor) -> Tensor:
        """Return the part of a tensor that every process holds whole."""
        return whole[self.slices].clone(memory_format=torch.contiguous_format)

    @property
    def slices(self) -> tuple[slice, ...]:
        """Where the part lies: parts of parts are cut from one piece, so each is one."""
        return tuple(
            slice(int(index[0]), int(index[-1]) + 1) if len(index) else slice(0)
            for index in self.indices
        )


def layout_of(tensor: Tensor, first: bool, what: str) -> Layout:
    """Find out which entries of a tensor are here.

    Args:
        tensor: sharded, or whole in every process.
        first: whether this process is the one that counts what all hold.
        what: the tensor's name in an error.

    Raises:
        ValueError: for a tensor that is a sum of parts, or is laid out in another way.
    """
    shape = tuple(tensor.shape)
    indices = [np.arange(size) for size in shape]
    if not is_sharded(tensor):
        return Layout(shape, tuple(indices), first)
    mesh, placements = tensor.device_mesh, tensor.placements
    coordinates = mesh.get_coordinate()
    if coordinates is None:
        raise ValueError(f"{what} has no part in this process: call it in those of its mesh only.")
    counts = True
    # fully_shard cuts what a tensor-parallel plan has cut before, though its mesh comes first.
    order = sorted(range(mesh.ndim), key=lambda i: hasattr(placements[i], "split_factor"))
    for i in order:
        placement = placements[i]
        if placement.is_replicate():
            counts = counts and coordinates[i] == 0
        elif hasattr(placement, "dim"):  # also of the strided kind that fully_shard makes
            index = indices[placement.dim]
            parts = torch.from_numpy(index).chunk(mesh.size(i))  # as torch cuts: some may be empty
            at = coordinates[i]
            indices[placement.dim] = parts[at].numpy() if at < len(parts) else index[:0]
        else:
            raise ValueError(f"{what} is spread as {placement}: redistribute it to shards first.")
    here, found = tuple(len(index) for index in indices), tuple(tensor.to_local().shape)
    if here != found and 0 not in found:  # fully_shard has its own shapes for empty parts
        raise ValueError(
            f"{what} holds a part of shape {found} here, where {here} "
            f"was expected of {placements}: redistribute it to plain shards first."
        )
    return Layout(shape, tuple(indices), counts)


def spread(part: Tensor, like: DTensor) -> DTensor:
    """Make of parts that every process has for itself a tensor laid out as another one."""
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        part, like.device_mesh, like.placements, run_check=False, shape=like.shape,
        stride=like.stride(),
    )  # fmt: skip


def laid_out(mask: Tensor, like: Tensor) -> Tensor:
    """Return a mask laid out as the weight that it is for."""
    if not is_sharded(like) or is_sharded(mask) and mask.placements == like.placements:
        return mask
    if is_sharded(mask):
        return mask.redistribute(like.device_mesh, like.placements)
    return spread(part_like(mask, like), like)


def part_like(whole: Tensor, like: Tensor) -> Tensor:
    """Return the part of a whole tensor that this process holds of another one: all, or a copy."""
    if not is_sharded(like):
        return whole
    part = layout_of(like, False, "a tensor").part_of(whole)
    return part.view(local_of(like).shape)  # fully_shard has its own shapes for empty parts


def whole_of(tensor: Tensor) -> Tensor:
    """Return a tensor with all of its entries: all processes must ask for it."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor

"""Layers read block by block: magnitudes and energy, in a small, steady amount of memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from itertools import repeat
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from torch_dimap.selection.importance import unit_scale

CPU_BLOCK = 1 << 17  # entries: magnitude, float64 copy and flags stay in cache
DEVICE_BLOCK = 1 << 20  # enough to fill a GPU; larger blocks only widen the error bound


# One layer's values, flat and in order, and for each of them whether it may be chosen
# (None means all): called anew for every reading, so that they need not lie in memory.
Blocks = Callable[[], Iterable[tuple[Tensor, "Tensor | None"]]]


class FlatLayer(NamedTuple):
    """One layer, flat, and what a first reading tells about it."""

    blocks: Blocks
    size: int
    zeros: int  # among the chooseable, as nonzeros
    nonzeros: int
    scale: Tensor  # power of two that brings the largest magnitude to about 1
    energy: float  # sum of squares of weight * scale


def block_size(tensor: Tensor) -> int:
    """Return how many entries are read at a time on the tensor's device."""
    return CPU_BLOCK if tensor.device.type == "cpu" else DEVICE_BLOCK


def blocks_of(weight: Tensor, mask: Tensor | None) -> Blocks:
    """Return the blocks of a tensor in memory; non-zero entries of the mask may be chosen."""
    flat = weight.detach().reshape(-1)
    parts = flat.split(block_size(flat))
    if mask is None:
        return lambda: zip(parts, repeat(None))
    chooseable = mask.detach().reshape(-1).to(torch.bool)
    allowed = chooseable.split(block_size(flat))
    return lambda: zip(parts, allowed)


def magnitude_of(weight: Tensor, chooseable: Tensor | None) -> Tensor:
    """Return the magnitudes of one block, -1 where nothing may be chosen."""
    return weight.abs() if chooseable is None else torch.where(chooseable, weight.abs(), -1.0)


def energy_above(magnitude: Tensor, above: float, scale: Tensor) -> Tensor | float:
    """Sum the scaled squares of one block's magnitudes greater than ``above``, in float64."""
    scaled = F.threshold(magnitude, above, 0.0).to(torch.float64).mul_(scale)
    return scalar(torch.dot(scaled, scaled))


def count_true(flags: Tensor) -> Tensor | float:
    """Count what is True in one block."""
    return scalar(torch.count_nonzero(flags))


def scalar(value: Tensor) -> Tensor | float:
    """Return one block's result as a number, but on a GPU as it is, not to wait for it.

    On the CPU, small tensors that outlive the large ones of their blocks would keep the
    allocator from using the memory of those again.
    """
    return value.item() if value.device.type == "cpu" else value


def total(blocks: list) -> float:
    """Add up one scalar per block: those on a GPU are fetched together; rounded once."""
    if blocks and isinstance(blocks[0], Tensor):
        blocks = torch.stack(blocks).tolist()
    return math.fsum(blocks)


def read_layer(blocks: Blocks) -> FlatLayer:
    """Count a layer's entries and sum their squares."""
    extremes = [x for weight, _ in blocks() if weight.numel() for x in torch.aminmax(weight)]
    if not extremes:
        return FlatLayer(blocks, 0, 0, 0, torch.ones(()), 0.0)
    scale = unit_scale(torch.stack(extremes).abs().max())
    size, fixed, nonzeros, energies = 0, [], [], []
    for weight, chooseable in blocks():
        magnitude = magnitude_of(weight, chooseable)
        size += weight.numel()
        if chooseable is not None:
            fixed.append(count_true(magnitude < 0))
        nonzeros.append(count_true(magnitude > 0))
        energies.append(energy_above(magnitude, 0.0, scale))
    nonzero = int(total(nonzeros))
    zeros = size - int(total(fixed)) - nonzero
    return FlatLayer(blocks, size, zeros, nonzero, scale, total(energies))


def sort(values: Tensor) -> Tensor:
    """Sort a vector, ascending: on the CPU NumPy's vectorized sort is far ahead of torch's."""
    if values.device.type != "cpu":
        return values.sort().values
    exact = values if values.dtype == torch.float64 else values.float()
    return torch.from_numpy(np.sort(exact.numpy()))


def pick(values: Tensor, flags: Tensor) -> Tensor:
    """Return the flagged values; on the CPU NumPy finds the flags far faster than torch does."""
    if values.device.type != "cpu":
        return values[flags]
    return values[torch.from_numpy(flags.numpy().nonzero()[0])]

"""Layers read block by block: magnitudes and energy, in a small, steady amount of memory."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from torch_dimap.importance import unit_scale

CPU_BLOCK = 1 << 17  # entries: magnitude, float64 copy and flags stay in cache
DEVICE_BLOCK = 1 << 20  # enough to fill a GPU; larger blocks only widen the error bound


class FlatLayer(NamedTuple):
    """One layer, flat, and what a first reading tells about it."""

    weight: Tensor
    chooseable: Tensor | None  # None means all
    zeros: int  # among the chooseable, as nonzeros
    nonzeros: int
    scale: Tensor  # power of two that brings the largest magnitude to about 1
    energy: float  # sum of squares of weight * scale


def block_size(tensor: Tensor) -> int:
    """Return how many entries are read at a time on the tensor's device."""
    return CPU_BLOCK if tensor.device.type == "cpu" else DEVICE_BLOCK


def magnitudes(weight: Tensor, chooseable: Tensor | None) -> Iterator[Tensor]:
    """Yield a flat layer's magnitudes block by block, -1 where nothing may be chosen."""
    blocks = weight.split(block_size(weight))
    if chooseable is None:
        yield from (block.abs() for block in blocks)
    else:
        for block, allowed in zip(blocks, chooseable.split(block_size(weight))):
            yield torch.where(allowed, block.abs(), -1.0)


def energy_above(magnitude: Tensor, above: float, scale: Tensor) -> Tensor:
    """Sum the scaled squares of one block's magnitudes greater than ``above``, in float64."""
    scaled = F.threshold(magnitude, above, 0.0).to(torch.float64).mul_(scale)
    return torch.dot(scaled, scaled)


def total(blocks: list[Tensor]) -> float:
    """Add up one scalar per block: fetched together, rounded once."""
    return math.fsum(torch.stack(blocks).tolist())


def read_layer(weight: Tensor, mask: Tensor | None) -> FlatLayer:
    """Count a layer's entries and sum their squares; non-zero mask entries may be chosen."""
    flat = weight.detach().reshape(-1)
    chooseable = None if mask is None else mask.detach().reshape(-1).to(torch.bool)
    entries = flat.numel() if chooseable is None else int(torch.count_nonzero(chooseable))
    if flat.numel() == 0:
        return FlatLayer(flat, chooseable, 0, 0, torch.ones(()), 0.0)
    scale = unit_scale(torch.stack(torch.aminmax(flat)).abs().max())
    nonzeros, energies = [], []
    for magnitude in magnitudes(flat, chooseable):
        nonzeros.append(torch.count_nonzero(magnitude > 0))
        energies.append(energy_above(magnitude, 0.0, scale))
    nonzero = int(total(nonzeros))
    return FlatLayer(flat, chooseable, entries - nonzero, nonzero, scale, total(energies))


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

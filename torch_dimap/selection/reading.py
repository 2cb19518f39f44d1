"""Weights read block by block: magnitudes and energy, in a small, steady amount of memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import repeat
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from torch_dimap.selection.importance import no_rank, unit_scale

CPU_BLOCK = 1 << 17  # entries: magnitude, float64 copy and flags stay in cache
DOT = 1 << 13  # entries of a dot product
DEVICE_BLOCK = 1 << 20  # enough to fill a GPU; larger blocks only widen the error bound


# One weight's values, flat and in order, and for each of them whether it may be chosen
# (None means all): called anew for every reading, so that they need not lie in memory.
Blocks = Callable[[], Iterable[tuple[Tensor, "Tensor | None"]]]


class FlatWeight(NamedTuple):
    """The weight of one layer, flat, and what a first reading tells about it."""

    blocks: Blocks
    size: int
    chooseable: int  # how many entries may go
    scale: float  # power of two that keeps the squares within float64
    energy: float  # sum of squares of scale * weight, over what may go


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


class Reading(NamedTuple):
    """What a first reading tells about a weight, or about a part of it."""

    size: int
    chooseable: int
    scale: float  # infinite where nothing may go
    energy: float  # sum of squares of scale * weight; NaN or infinite where the weight is


def read_weight(blocks: Blocks, what: str) -> FlatWeight:
    """Count a weight's entries and sum their squares; raise unless all are finite."""
    return weight_of(blocks, [read_part(blocks)], what)


def weight_of(blocks: Blocks, readings: Sequence[Reading], what: str) -> FlatWeight:
    """Join what was read of all parts of a weight; raise unless all entries are finite."""
    scale = min(x.scale for x in readings)
    scale = 1.0 if math.isinf(scale) else scale
    energy = math.fsum(x.energy * (scale / x.scale) ** 2 for x in readings)
    if not math.isfinite(energy):
        raise no_rank(what)
    size, chooseable = sum(x.size for x in readings), sum(x.chooseable for x in readings)
    return FlatWeight(blocks, size, chooseable, scale, energy)


def read_part(blocks: Blocks) -> Reading:
    """Count the entries that are here, and sum their squares."""
    found = _scale(blocks)
    scale = 1.0 if math.isinf(found) else found
    size, chooseable, energies, others = 0, [], [], []
    for weight, allowed in blocks():
        size += weight.numel()
        if allowed is not None:
            chooseable.append(count_true(allowed))
            others.append(_zero_if_finite(weight))
            weight = torch.where(allowed, weight, 0.0)
        energies.append(_energy(weight, scale))
    energy = total(energies) + total(others)
    return Reading(size, int(total(chooseable)) if chooseable else size, found, energy)


def _scale(blocks: Blocks) -> float:
    """Return what to multiply float64 entries by: the squares of all others fit in anyway."""
    largest = []  # of what may go: entries behind a mask may be far greater
    for weight, allowed in blocks():
        if weight.dtype != torch.float64:
            return 1.0
        if weight.numel():
            largest.append(magnitude_of(weight, allowed).max())
    top = torch.stack(largest).max() if largest else torch.tensor(-1.0)
    return unit_scale(top).item() if top >= 0 else math.inf


def _zero_if_finite(weight: Tensor) -> Tensor | float:
    """Return NaN for a block with NaN or infinity, without squares, which might overflow."""
    zero = (weight - weight).sum()
    return zero if zero.device.type != "cpu" else float(zero)


def magnitude_of(weight: Tensor, chooseable: Tensor | None) -> Tensor:
    """Return the magnitudes of one block, -1 where nothing may be chosen."""
    return weight.abs() if chooseable is None else torch.where(chooseable, weight.abs(), -1.0)


def energy_above(magnitude: Tensor, above: float, scale: float) -> Tensor | float:
    """Sum the scaled squares of one block's magnitudes greater than ``above``, in float64."""
    return _energy(F.threshold(magnitude, above, 0.0), scale)


def _energy(values: Tensor, scale: float) -> Tensor | float:
    wide = values.to(torch.float64)
    if scale != 1.0:
        wide = wide * scale
    if wide.device.type != "cpu":
        return torch.dot(wide, wide)
    # Beyond 10,000 entries BLAS libraries share a dot product among threads of their own.
    numbers = wide.numpy()
    parts = [numbers[i : i + DOT] for i in range(0, len(numbers), DOT)]
    return float(sum(np.dot(part, part) for part in parts))


def greater(magnitude: Tensor, than: float, out: Tensor | None = None) -> Tensor:
    """Compare one block with a number of its dtype; on the CPU NumPy is far ahead of torch."""
    if magnitude.device.type != "cpu":
        return torch.gt(magnitude, than, out=out)
    numbers, bound = magnitude, than
    if magnitude.itemsize == 2:  # NumPy would be slow or has no such type: the bits order alike
        numbers = magnitude.view(torch.int16)
        bound = torch.tensor(than, dtype=magnitude.dtype).view(torch.int16).item()
    flags = np.greater(numbers.numpy(), bound, out=None if out is None else out.numpy())
    return torch.from_numpy(flags)


def count_true(flags: Tensor) -> Tensor | float:
    """Count what is True in one block."""
    if flags.device.type != "cpu":
        return torch.count_nonzero(flags)
    return float(np.count_nonzero(flags.numpy()))


def pick(values: Tensor, flags: Tensor) -> Tensor:
    """Return the flagged values."""
    return values[places(flags)]


def places(flags: Tensor) -> Tensor:
    """Return where flags are set; on the CPU NumPy finds them far faster than torch does."""
    if flags.device.type != "cpu":
        return flags.nonzero().squeeze(1)
    return torch.from_numpy(flags.numpy().nonzero()[0])


def ascending(values: Tensor) -> np.ndarray:
    """Sort a vector: on the CPU NumPy's vectorized sort is far ahead of torch's."""
    if values.device.type != "cpu":
        values = values.sort().values.cpu()
    exact = values if values.dtype == torch.float64 else values.float()
    return np.sort(exact.numpy())


def total(blocks: list) -> float:
    """Add up one scalar per block: those on a GPU are fetched together; rounded once."""
    if blocks and isinstance(blocks[0], Tensor):
        blocks = torch.stack(blocks).tolist()
    return math.fsum(blocks)

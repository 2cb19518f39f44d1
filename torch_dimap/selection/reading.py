"""Weights read block by block: magnitudes and energy, in a small, steady amount of memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import repeat
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from torch_dimap.selection.importance import no_rank, unit_scale

CPU_BLOCK = 1 << 18  # entries: magnitude and flags stay in cache
WIDE = 1 << 17  # entries: so does their copy in float64
FAINT = 2.0**-80  # a sum of squares in float32 under which small ones may have been lost
DEVICE_BLOCK = 1 << 20  # enough to fill a GPU; larger blocks only widen the error bound


# One weight's values, flat and in order, and for each of them whether it may be chosen
# (None means all): called anew for every reading, so that they need not lie in memory.
Blocks = Callable[[], Iterable[tuple[Tensor, "Tensor | None"]]]


INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by the bytes of an entry


class Scratch:
    """Memory for what is computed of a block, used again for the next block of a weight.

    What is allocated for each block is given back to the system and asked for again, for
    which the threads of a process wait for each other.
    """

    def __init__(self) -> None:
        self._held: dict[str, Tensor] = {}

    def take(self, what: str, block: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Return room for one value for each entry of a block; it holds what it held before."""
        held = self._held.get(what)
        if held is None or held.numel() < block.numel():
            held = torch.empty(block.numel(), dtype=dtype or block.dtype, device=block.device)
            self._held[what] = held
        return held if held.numel() == block.numel() else held[: block.numel()]


class FlatWeight(NamedTuple):
    """The weight of one layer, flat, and what a first reading tells about it."""

    blocks: Blocks
    size: int
    chooseable: int  # how many entries may go
    scale: float  # power of two that keeps the squares within float64
    energy: float  # about the sum of squares of scale * weight, over what may go


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
    scale: float  # infinite where nothing but zeros may go
    energy: float  # about the sum of squares of scale * weight; NaN or infinite where that is


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
    """Count the entries that are here, and sum their squares, as nearly as a sample needs it."""
    found = _scale(blocks)
    scale = 1.0 if math.isinf(found) else found
    size, chooseable, energies, others, scratch = 0, [], [], [], Scratch()
    for weight, allowed in blocks():
        size += weight.numel()
        if allowed is not None:
            chooseable.append(count_true(allowed))
            others.append(_zero_if_finite(weight))
            weight = magnitude_of(weight, scratch, allowed)
        energies.append(_about_energy(weight, scale, scratch))
    energy = total(energies) + total(others)
    return Reading(size, int(total(chooseable)) if chooseable else size, found, energy)


def _scale(blocks: Blocks) -> float:
    """Return what to multiply float64 entries by: the squares of all others fit in anyway."""
    largest, scratch = [], Scratch()  # of what may go: entries behind a mask may be far greater
    for weight, allowed in blocks():
        if weight.dtype != torch.float64:
            return 1.0
        if weight.numel():
            largest.append(magnitude_of(weight, scratch, allowed).max())
    top = torch.stack(largest).max() if largest else torch.tensor(0.0)
    return unit_scale(top).item() if top != 0 else math.inf  # a NaN is found by its energy


def _about_energy(values: Tensor, scale: float, scratch: Scratch) -> Tensor | float:
    """Sum the squares of one block in float32 where that is near enough, else in float64."""
    if values.device.type == "cpu" and values.dtype != torch.float64:
        narrow = values
        if values.dtype != torch.float32:
            narrow = scratch.take("narrow", values, torch.float32).copy_(values)
        energy = float(torch.dot(narrow, narrow))
        if FAINT < energy < math.inf:  # neither too small, nor too large, nor NaN
            return energy
    return _energy(values, scale, scratch)


def _zero_if_finite(weight: Tensor) -> Tensor | float:
    """Return NaN for a block with NaN or infinity, without squares, which might overflow."""
    zero = (weight - weight).sum()
    return zero if zero.device.type != "cpu" else float(zero)


def magnitude_of(values: Tensor, scratch: Scratch, chooseable: Tensor | None = None) -> Tensor:
    """Return the magnitudes of one block, 0 where nothing may be chosen.

    The memory is used again for the next block.
    """
    magnitude = torch.abs(values, out=scratch.take("magnitude", values))
    if chooseable is not None:
        _zero_unless(chooseable, magnitude, scratch)
    return magnitude


def _zero_unless(flags: Tensor, values: Tensor, scratch: Scratch) -> None:
    """Set to zero what is not flagged, by bits: torch.where is far slower on the CPU."""
    bits = values.view(INTEGERS[values.itemsize])
    bits.bitwise_and_(scratch.take("keep", bits).copy_(flags).neg_())  # all bits, or none


class Found(NamedTuple):
    """What is found in one block between two magnitudes, and above them."""

    inside: Tensor
    above: Tensor | float  # how many
    energy: Tensor | float  # above, scaled
    read: int  # entries of the block


def search_between(weight: FlatWeight, limits: tuple[float, float]) -> Iterator[Found]:
    """Read a weight, or the part that is here, for what lies between two magnitudes."""
    (low, high), scratch = limits, Scratch()
    for values, chooseable in weight.blocks():
        magnitude, read = magnitude_of(values, scratch), values.numel()
        inside = scratch.take("inside", magnitude, torch.bool)
        inside = greater(magnitude, chooseable, low, inside)
        if high == math.inf:
            yield Found(pick(magnitude, inside), 0.0, 0.0, read)
            continue
        over = scratch.take("over", magnitude, torch.bool)
        over = greater(magnitude, chooseable, high, over)
        found = pick(magnitude, inside.logical_xor_(over))
        if chooseable is None:
            torch.threshold_(magnitude, high, 0.0)
        else:
            _zero_unless(over, magnitude, scratch)
        yield Found(found, count_true(over), _energy(magnitude, weight.scale, scratch), read)


def _energy(values: Tensor, scale: float, scratch: Scratch) -> Tensor | float:
    """Sum the scaled squares of one block, in float64."""
    if values.device.type != "cpu":
        return _norm(values, scale, scratch).square()
    return math.fsum(_norm(x, scale, scratch).item() ** 2 for x in values.split(WIDE))


def _norm(values: Tensor, scale: float, scratch: Scratch) -> Tensor:
    wide = scratch.take("wide", values, torch.float64).copy_(values)
    if scale != 1.0:
        wide.mul_(scale)
    return torch.linalg.vector_norm(wide)  # NumPy's products keep Python's lock meanwhile


def larger(
    values: Tensor, chooseable: Tensor | None, than: float, scratch: Scratch, out: Tensor | None
) -> Tensor:
    """Compare the magnitudes of one block with a number, False where nothing may be chosen."""
    if values.device.type != "cpu" or values.itemsize == 2:
        return greater(magnitude_of(values, scratch), chooseable, than, out)
    # Both signs at once: two comparisons take less time than one that waits for magnitudes.
    above = greater(values, None, than, out)
    below = np.less(values.numpy(), -than, out=scratch.take("below", above).numpy())
    np.logical_or(above.numpy(), below, out=above.numpy())
    return _among(chooseable, above)


def greater(
    magnitude: Tensor, chooseable: Tensor | None, than: float, out: Tensor | None = None
) -> Tensor:
    """Compare one block with a number of its dtype; on the CPU NumPy is far ahead of torch."""
    if magnitude.device.type != "cpu":
        return _among(chooseable, torch.gt(magnitude, than, out=out))
    numbers, bound = magnitude, than
    if magnitude.itemsize == 2:  # NumPy would be slow or has no such type: the bits order alike
        numbers = magnitude.view(torch.int16)
        bound = torch.tensor(than, dtype=magnitude.dtype, device="cpu").view(torch.int16).item()
    flags = np.greater(numbers.numpy(), bound, out=None if out is None else out.numpy())
    return _among(chooseable, torch.from_numpy(flags))


def equal(
    values: Tensor, chooseable: Tensor | None, magnitude: float, scratch: Scratch
) -> Tensor:
    """Return the places in one block of the chooseable entries that have a magnitude."""
    return places(_among(chooseable, magnitude_of(values, scratch) == magnitude))


def _among(chooseable: Tensor | None, flags: Tensor) -> Tensor:
    """Take flags away where nothing may be chosen."""
    return flags if chooseable is None else flags.logical_and_(chooseable)


def count_true(flags: Tensor) -> Tensor | float:
    """Count what is True in one block."""
    if flags.device.type != "cpu":
        return torch.count_nonzero(flags)
    return float(np.count_nonzero(flags.numpy()))


def pick(values: Tensor, flags: Tensor) -> Tensor:
    """Return the flagged values of one block, in order."""
    if flags.device.type != "cpu":
        return values[places(flags)]
    # Where few are flagged, it is sooner known in which eights they are, and then among these.
    numbers, found = values.view(INTEGERS[values.itemsize]).numpy(), flags.numpy()
    even = found.size - found.size % 8
    eights = found[:even].view(np.uint64)
    near = eights.astype(bool).nonzero()[0]
    beside, flagged = numbers[:even].reshape(-1, 8).take(near, 0), eights.take(near).view(bool)
    picked = beside.ravel()[flagged.nonzero()[0]]
    if even < found.size:
        picked = np.append(picked, numbers[even:][found[even:]])
    return torch.from_numpy(picked).view(values.dtype)


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

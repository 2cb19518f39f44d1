"""Masks as bits and the values that they keep, block by block.

A mask takes ``ceil(n / 8)`` bytes: entry ``i`` of the flattened tensor is bit ``i % 8``,
least significant first, of byte ``i // 8``; bits beyond the last entry are 0. Values are
moved as integers of their width, so no bit of them changes, be they NaN or -0.0.
NumPy does it: torch's indexing by a mask is many times slower on the CPU.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits_of(tensor: Tensor) -> np.ndarray:
    """Return a flat tensor's values as integers of the same width, sharing its memory."""
    return tensor.contiguous().view(_INTEGERS[tensor.dtype.itemsize]).numpy()


def tensor_of(content: np.ndarray, dtype: torch.dtype) -> Tensor:
    """Return bytes as a flat tensor, sharing their memory."""
    # Of nothing NumPy makes a tensor that torch cannot view as another dtype.
    return torch.from_numpy(content).view(dtype) if content.size else torch.empty(0, dtype=dtype)


def packed_size(entries: int) -> int:
    """Return how many bytes the mask of so many entries takes."""
    return -(-entries // 8)


def pack_mask(keep: Tensor) -> np.ndarray:
    """Pack a flat boolean mask into bytes."""
    return np.packbits(keep.numpy(), bitorder="little")


def unpack_mask(packed: np.ndarray, entries: int) -> Tensor:
    """Undo :func:`pack_mask`."""
    flags = np.unpackbits(packed, count=entries, bitorder="little")
    return torch.from_numpy(flags.view(np.bool_))


def places_of(keep: Tensor) -> np.ndarray:
    """Return at which places a flat mask keeps the values."""
    return keep.numpy().nonzero()[0]


def gather(values: Tensor, keep: Tensor) -> np.ndarray:
    """Return the kept values in order, as integers."""
    return bits_of(values)[places_of(keep)]


def scatter(kept: Tensor, places: np.ndarray, entries: int) -> Tensor:
    """Undo :func:`gather`: all other entries are +0.0."""
    values = torch.zeros(entries, dtype=kept.dtype)
    bits_of(values)[places] = bits_of(kept)
    return values


def zeroed(values: Tensor, keep: Tensor) -> np.ndarray:
    """Return the values with +0.0 where they are not kept, as integers."""
    return bits_of(values) * keep.numpy()

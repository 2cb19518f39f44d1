"""Many short arrays as one string of few bytes, without loss."""

from __future__ import annotations

import pickle
import zlib
from collections.abc import Sequence

import numpy as np


def packed(parts: Sequence[tuple]) -> bytes:
    """Join parts to a string, shortest where their values ascend.

    Args:
        parts: tuples of numbers, values and counts (an array, or None).
    """
    numbers, values, counts = zip(*parts)
    lengths = [len(x) for x in values]
    told = numbers, lengths, _joined(values), _joined(counts)
    return zlib.compress(pickle.dumps(told), level=1)  # the steps leave little for more


def unpacked(data: bytes) -> list[tuple]:
    """Return the parts that were joined."""
    numbers, lengths, values, counts = pickle.loads(zlib.decompress(data))
    return list(zip(numbers, _parted(lengths, *values), _parted(lengths, *counts)))


def _joined(arrays: Sequence[np.ndarray | None]) -> tuple[bytes, bytes]:
    """Return a letter for each array's dtype, and all of their bytes."""
    found = [("-", np.empty(0, np.uint8)) if x is None else _narrowest(x) for x in arrays]
    letters = "".join(letter for letter, _ in found)
    return letters.encode(), b"".join(_bytes_of(integers) for _, integers in found)


def _parted(lengths: Sequence[int], letters: bytes, data: bytes) -> list[np.ndarray | None]:
    found: list[np.ndarray | None] = []
    start = 0
    for letter, length in zip(letters.decode(), lengths):
        if letter == "-":
            found.append(None)
            continue
        integer, sent, wide = _LETTERS[letter]
        end = start + length * np.dtype(integer).itemsize
        integers = _integers_of(data[start:end], integer)
        start = end
        if letter == "b":  # the upper half of a float32
            integers = integers.astype(np.uint32) << 16
        found.append(integers.view(sent).astype(wide, copy=False))
    return found


# The integers that numbers travel as, what these are the bits of, and the dtype at the other end.
_LETTERS = {
    "b": (np.uint16, np.float32, np.float32), "e": (np.uint16, np.float16, np.float32),
    "f": (np.uint32, np.float32, np.float32), "d": (np.uint64, np.float64, np.float64),
    "i": (np.uint32, np.int32, np.int64), "l": (np.uint64, np.int64, np.int64),
    "B": (np.uint8, np.uint8, np.uint8),
}  # fmt: skip


def _narrowest(values: np.ndarray) -> tuple[str, np.ndarray]:
    """Return the letter of the shortest dtype that holds an array, and the bits in that."""
    letter = np.dtype(values.dtype).char
    if values.dtype == np.float32:
        bits = np.ascontiguousarray(values).view(np.uint32)
        if not (bits & 0xFFFF).any():
            return "b", (bits >> 16).astype(np.uint16)
        with np.errstate(over="ignore"):
            half = values.astype(np.float16)
        if (half == values).all():
            letter, values = "e", half
    elif values.dtype == np.int64 and values.max(initial=0) < 1 << 31:
        letter, values = "i", values.astype(np.int32)
    return letter, np.ascontiguousarray(values).view(_LETTERS[letter][0])


def _bytes_of(integers: np.ndarray) -> bytes:
    """Return the steps from each integer to the next, their first bytes together, and so on.

    Most bytes are zeros where the integers ascend, which is what compression makes short.
    """
    steps = np.diff(integers, prepend=integers.dtype.type(0))
    return steps.view(np.uint8).reshape(-1, integers.itemsize).T.tobytes()


def _integers_of(data: bytes, dtype: type) -> np.ndarray:
    planes = np.frombuffer(data, np.uint8).reshape(np.dtype(dtype).itemsize, -1)
    steps: np.ndarray = np.ascontiguousarray(planes.T).view(dtype)
    return steps.ravel().cumsum(dtype=dtype)

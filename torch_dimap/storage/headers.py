"""The header of a safetensors file: read from hands that are not trusted, and written.

Eight bytes hold the header's length, little-endian; the header is JSON: name -> dtype,
shape and the range of bytes after the header, and ``__metadata__``, text -> text. The
library's own writer wants all tensors in memory, and its reader maps the whole file; a
stream needs neither. Source: https://huggingface.co/docs/safetensors, "Format".
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

_TORCH_NAMES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8",
    "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8", "BOOL": "bool",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz", "C64": "complex64",
}  # fmt: skip
DTYPES = {name: getattr(torch, n) for name, n in _TORCH_NAMES.items() if hasattr(torch, n)}
NAMES = {dtype: name for name, dtype in DTYPES.items()}

MAX_HEADER = 100_000_000  # bytes, as in the safetensors library


class Kind(NamedTuple):
    """What a stored tensor is."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Return the number of entries."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        return self.size * self.dtype.itemsize


class Stored(NamedTuple):
    """Where a tensor is stored: bytes of the file."""

    kind: Kind
    begin: int
    end: int


def read_header(descriptor: int, path: str) -> tuple[dict[str, Stored], dict[str, str]]:
    """Read and check the header of an open file.

    Args:
        descriptor: of the file.
        path: its name, for messages.

    Returns:
        Name -> where it is stored, in the order of the file; and the metadata. The
        ranges are inside the file, as long as their shapes say, and do not overlap.

    Raises:
        ValueError: if the file is no whole and sound safetensors file.
    """
    size = os.fstat(descriptor).st_size
    length = int.from_bytes(os.pread(descriptor, 8, 0), "little")
    if size < 8 or length > min(MAX_HEADER, size - 8):
        raise ValueError(
            f"{path} must be a whole safetensors file, found {size:,} bytes, too few for a "
            "header of the length that it tells: fetch the file again."
        )
    header = parse_json(os.pread(descriptor, length, 8), f"the header of {path}")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ValueError(f"{path} must have metadata of text -> text, found other values in it.")
    stored = {name: _stored(name, entry, 8 + length, path) for name, entry in header.items()}
    place = 8 + length
    for name, item in sorted(stored.items(), key=lambda pair: (pair[1].begin, pair[1].end)):
        if item.begin != place:
            raise ValueError(
                f"{path} must hold its tensors one after the other, found that {name!r} begins "
                f"at byte {item.begin:,} where {place:,} was expected."
            )
        place = item.end
    if place != size:
        raise ValueError(
            f"{path} must be {place:,} bytes long by its header, found {size:,}: it is not "
            "whole, fetch it again."
        )
    return stored, metadata


def lay_out(
    kinds: Mapping[str, Kind], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, Stored]]:
    """Return the header, and where in the file each tensor goes.

    Wide dtypes come first, so that all are aligned. Metadata of the same length as JSON
    give the same places.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    place = 0
    for name in sorted(kinds, key=lambda name: (-kinds[name].dtype.itemsize, name)):
        kind = kinds[name]
        ends = [place, place + kind.bytes]
        header[name] = {"dtype": NAMES[kind.dtype], "shape": kind.shape, "data_offsets": ends}
        place = ends[1]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    stored = {
        name: Stored(kind, *(start + end for end in header[name]["data_offsets"]))
        for name, kind in kinds.items()
    }
    return len(text).to_bytes(8, "little") + text, stored


def parse_json(text: bytes, what: str) -> dict[str, Any]:
    """Read a JSON object, strictly.

    Raises:
        ValueError: if it is none, or a key occurs in it twice.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise ValueError("a key occurs twice")
        return found

    try:
        found = json.loads(text.decode("utf-8"), object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{what} must be JSON, found text that is not: {error}.") from error
    if not isinstance(found, dict):
        raise ValueError(f"{what} must be a JSON object, found another value.")
    return found


def check_kind(dtype: Any, shape: Any, what: str) -> Kind:
    """Check a dtype's name and a shape, as JSON gave them."""
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"{what} must have a dtype that torch knows, found {str(dtype)[:20]!r}.")
    if not isinstance(shape, list) or not all(type(d) is int and d >= 0 for d in shape):
        raise ValueError(f"{what} must have a shape of sizes that are not negative.")
    # As if empty sides were 1: what torch computes strides from must not overflow either.
    if math.prod(max(1, side) for side in shape) > sys.maxsize // 16:
        raise ValueError(f"{what} must have a shape that fits into memory, found a larger one.")
    return Kind(DTYPES[dtype], tuple(shape))


def _stored(name: str, entry: Any, start: int, path: str) -> Stored:
    what = f"{path}: {name!r}"
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= set(entry):
        raise ValueError(f"{what} must tell dtype, shape and data_offsets, found not all of them.")
    kind = check_kind(entry["dtype"], entry["shape"], what)
    ends = entry["data_offsets"]
    if not isinstance(ends, list) or [type(end) for end in ends] != [int, int]:
        raise ValueError(f"{what} must have two numbers as data_offsets.")
    if ends[1] - ends[0] != kind.bytes or ends[0] < 0:
        raise ValueError(
            f"{what} must take {kind.bytes:,} bytes by its shape, found offsets {ends}."
        )
    return Stored(kind, start + ends[0], start + ends[1])

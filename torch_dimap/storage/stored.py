"""Weights by name, read block by block: of safetensors, shards, pickles, folders, state dicts.

What is read here may have been made to do harm: sizes are checked before memory is asked
for, counts and checksums when the values are read, and pickles are loaded by torch with
``weights_only=True``, which runs no code.
"""

from __future__ import annotations

import os
import re
import stat
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from torch_dimap.selection import CPU_BLOCK, threaded_map
from torch_dimap.storage.entries import Entry, entry_of, join_masks
from torch_dimap.storage.folders import INDEX, weights_in
from torch_dimap.storage.headers import MAX_HEADER, Kind, Stored, parse_json, read_header
from torch_dimap.storage.packing import packed_size, places_of, scatter, tensor_of, unpack_mask
from torch_dimap.storage.pickles import check_plain, mapped_ranges, place_in_file, read_pickle
from torch_dimap.storage.records import Record, kept_name, mask_name, read_record
from torch_dimap.storage.state_dicts import find_state_dict
from torch_dimap.text import name_some

BLOCK = 1 << 14  # entries read from a file at a time: few, since memory is what counts there

Checkpoint = str | os.PathLike[str] | Mapping[str, Any]  # the last: what torch.load returned


class Weights(NamedTuple):
    """What a checkpoint holds."""

    entries: dict[str, Entry]
    files: list[Path]
    metadata: dict[str, str]
    record: Record | None  # what this package wrote about its pruning


def holds_masks_alone(weights: Weights) -> bool:
    """Tell a file that has no values to read."""
    return weights.record is not None and weights.record.content == "masks"


def refuse_masks_alone(weights: Weights, where: str) -> None:
    """Raise for a file that has no values to read."""
    if holds_masks_alone(weights):
        raise ValueError(
            f"{where} must hold weights, found masks alone: load_pruned(model, path) puts them "
            "on the weights that they belong to."
        )


class Content(NamedTuple):
    """A file's bytes, wherever they are."""

    fetch: Callable[[int, int], np.ndarray]  # from one place to another
    block: int  # entries to read at a time, a multiple of 8


def name_of(checkpoint: Checkpoint) -> str:
    """Return what messages call a checkpoint, once it is seen that it can be one."""
    if not isinstance(checkpoint, (str, os.PathLike, Mapping)):
        raise TypeError(
            f"a checkpoint must be a path or a state dict, found {type(checkpoint).__name__}."
        )
    return "the state dict" if isinstance(checkpoint, Mapping) else os.fspath(checkpoint)


@contextmanager
def open_weights(checkpoint: Checkpoint, in_memory: bool = False) -> Iterator[Weights]:
    """Open a checkpoint of any kind; its tensors are read when they are asked for.

    Args:
        checkpoint: a ``.safetensors`` file, also one of :func:`torch_dimap.save_pruned`; an
            index of shards, ``*.safetensors.index.json``; what ``torch.save`` wrote: a state
            dict, or a dict that holds one under a key as training scripts use it; a folder
            of Hugging Face with one of these; or such a dict itself.
            ``<name>_orig`` and ``<name>_mask`` are joined to ``<name>``.
            The names in safetensors files, which do not keep an order, are sorted so that
            layers come as in the model; it matters where scores of two layers are equal.
        in_memory: read the files now, as they are, and never again.

    Raises:
        TypeError: if it is neither a path nor a mapping.
        ValueError: if it is none of these, is damaged, or holds no tensor.
        OSError: if it cannot be read.
    """
    where = name_of(checkpoint)
    with ExitStack() as stack:
        if isinstance(checkpoint, Mapping):
            tensors = find_state_dict(checkpoint, where)
            entries = {name: entry_of(check_plain(t, where)) for name, t in tensors.items()}
            weights = Weights(entries, [], {}, None)
        else:
            file = Path(checkpoint)
            file = weights_in(file) if file.is_dir() else file
            open_it = _open_shards if file.name.endswith(INDEX) else _open_file
            weights = open_it(file, stack, in_memory)
        if not weights.entries:
            raise ValueError(f"{where} must hold a state dict, found no tensor in it.")
        if weights.record is None:
            weights = weights._replace(entries=join_masks(weights.entries, where))
        yield weights


def _open_file(file: Path, stack: ExitStack, in_memory: bool) -> Weights:
    if not stat.S_ISREG(file.stat().st_mode):
        raise ValueError(f"{file} must be a checkpoint, found that it is no regular file.")
    descriptor = os.open(file, os.O_RDONLY)
    stack.callback(os.close, descriptor)
    # A header of JSON begins at byte 8, where a pickle or a zip archive has no brace.
    if file.suffix != ".safetensors" and os.pread(descriptor, 1, 8) != b"{":
        entries = _of_pickle(_content(descriptor, file, in_memory), file)
        return Weights(entries, [file], {}, None)
    stored, metadata = read_header(descriptor, str(file))
    record = read_record(metadata, str(file))
    content = _content(descriptor, file, in_memory)
    if record is None:
        entries = {name: _plain(content, item) for name, item in stored.items()}
    else:
        entries = _recorded(content, stored, record, str(file))
    return Weights(_in_order(entries), [file], metadata, record)


def _open_shards(index: Path, stack: ExitStack, in_memory: bool) -> Weights:
    if index.stat().st_size > MAX_HEADER:
        raise ValueError(f"{index} must be an index of shards, found too large a file.")
    places = parse_json(index.read_bytes(), str(index)).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(x, str) for x in places.values()):
        raise ValueError(f"{index} must have a weight_map, name -> file name, found none.")
    entries: dict[str, Entry] = {}
    files = [index]
    for shard in dict.fromkeys(places.values()):
        if shard in ("", ".", "..") or set(shard) & set("/\\\0"):
            raise ValueError(
                f"{index} must name files of its own folder as shards, found {shard[:40]!r}."
            )
        found = _open_file(index.with_name(shard), stack, in_memory)
        if found.record is not None:
            raise ValueError(f"{index} must name plain shards, found a pruned file, {shard}.")
        listed = {name for name, place in places.items() if place == shard}
        if listed != set(found.entries):
            odd = min(listed ^ set(found.entries))
            raise ValueError(
                f"{index} must list just what its shards hold, found that {odd!r} is missing "
                f"in one of {shard} and the index: fetch both again."
            )
        entries |= found.entries
        files += found.files
    return Weights(_in_order(entries), files, {}, None)


def _in_order(entries: dict[str, Entry]) -> dict[str, Entry]:
    """Sort entries as models define them: ``blocks.10`` behind ``blocks.2``, query before key."""
    return {name: entries[name] for name in sorted(entries, key=_natural)}


def _natural(name: str) -> list[str | int]:
    name = re.sub(r"(\.w?)q(?=(uery|_proj)?\.)", r"\1j", name)
    return [int(x) if i % 2 else x for i, x in enumerate(re.split(r"([0-9]{1,18})", name))]


def _content(descriptor: int, file: Path, in_memory: bool) -> Content:
    """Return what reads an open file, or its content as it is now."""
    fetch = partial(_read, descriptor, str(file))
    if not in_memory:
        return Content(fetch, BLOCK)
    content = fetch(0, os.fstat(descriptor).st_size)
    return Content(partial(_part, content), CPU_BLOCK)


def _read(descriptor: int, path: str, begin: int, end: int) -> np.ndarray:
    """Read bytes of an open file."""
    content = np.empty(end - begin, np.uint8)
    rest = content.data
    while rest.nbytes:
        read = os.preadv(descriptor, [rest], end - rest.nbytes)
        if not read:
            raise ValueError(f"{path} ends too early: it was cut while it was read.")
        rest = rest[read:]
    return content


def _part(content: np.ndarray, begin: int, end: int) -> np.ndarray:
    return content[begin:end]


def _recorded(
    content: Content, stored: dict[str, Stored], record: Record, path: str
) -> dict[str, Entry]:
    """Return the entries of a file that this package wrote, once all in it fits together."""
    if set(record.crc32) != set(stored):
        raise ValueError(f"{path} must have a checksum for each of its tensors, and no other.")
    with threaded_map(len(stored)) as map_:
        checksums = map_(lambda x: zlib.crc32(content.fetch(x.begin, x.end).data), stored.values())
        damaged = [name for name, found in zip(stored, checksums) if found != record.crc32[name]]
    if damaged:
        raise ValueError(
            f"{path} is damaged: the checksums of {name_some(damaged)} are not those of the "
            "record: fetch it again."
        )
    rest = dict(stored)
    entries = {}
    for name, pruned in record.pruned.items():
        what = f"{path}: {name!r}"
        if record.content == "dense":
            if name not in stored or stored[name].kind != pruned.kind:
                raise ValueError(f"{what} must be stored as its record says, found it is not.")
            continue
        mask = rest.pop(mask_name(name), None)
        kept = rest.pop(kept_name(name), None) if record.content == "compressed" else None
        if mask is None or mask.kind != Kind(torch.uint8, (packed_size(pruned.kind.size),)):
            raise ValueError(f"{what} must have a mask of {packed_size(pruned.kind.size):,} bytes.")
        bits = int.from_bytes(content.fetch(mask.begin, mask.end).data, "little")
        count = bits.bit_count()
        if bits.bit_length() > pruned.kind.size:
            raise ValueError(f"{what} must have no bits in its mask behind the last entry.")
        if record.content == "compressed" and (
            kept is None or kept.kind != Kind(pruned.kind.dtype, (count,))
        ):
            raise ValueError(f"{what} must have as many values as bits in its mask, {count:,}.")
        entries[name] = Entry(
            pruned.kind, partial(_unpacked, content, pruned.kind, mask, kept), True, True, count
        )
    if record.content == "masks" and rest or set(rest) & set(entries):
        raise ValueError(f"{path} must hold each tensor once, found {min(rest)!r} besides.")
    return entries | {name: _plain(content, item) for name, item in rest.items()}


def _plain(content: Content, item: Stored) -> Entry:
    def blocks() -> Iterator[tuple[Tensor, None]]:
        place = item.begin
        for size in _block_sizes(item.kind.size, content.block):
            end = place + size * item.kind.dtype.itemsize
            yield tensor_of(content.fetch(place, end), item.kind.dtype), None
            place = end

    return Entry(item.kind, blocks)


def _unpacked(
    content: Content, kind: Kind, mask: Stored, kept: Stored | None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield a pruned tensor's values, of masks alone the mask in their place, and its mask."""
    place, next_value = mask.begin, kept.begin if kept else 0
    for size in _block_sizes(kind.size, content.block):
        keep = unpack_mask(content.fetch(place, place + packed_size(size)), size)
        place += packed_size(size)
        if kept is None:
            yield keep, keep
            continue
        places = places_of(keep)
        end = next_value + len(places) * kind.dtype.itemsize
        yield scatter(tensor_of(content.fetch(next_value, end), kind.dtype), places, size), keep
        next_value = end


def _block_sizes(entries: int, block: int) -> Iterator[int]:
    """Yield the number of entries of each block: at least one block."""
    for start in range(0, max(1, entries), block):
        yield min(block, entries - start)


def _of_pickle(content: Content, file: Path) -> dict[str, Entry]:
    """Return the entries of what torch.save wrote, read from the file wherever that is possible."""
    tensors = read_pickle(file)
    mapped = mapped_ranges(file)
    entries = {}
    for name, tensor in tensors.items():
        entry = entry_of(tensor)
        begin = place_in_file(tensor, mapped)
        if begin is not None:
            item = Stored(entry.kind, begin, begin + entry.kind.bytes)
            entry = entry._replace(blocks=_plain(content, item).blocks)
        entries[name] = entry
    return entries

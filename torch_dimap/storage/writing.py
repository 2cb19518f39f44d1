"""State dicts written to one safetensors file, pruned tensors packed or with zeros in them."""

from __future__ import annotations

import hashlib
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from itertools import tee
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torch_dimap.selection import Cut, Map, apply_cut
from torch_dimap.storage.entries import Entry, count_kept
from torch_dimap.storage.headers import Kind, lay_out
from torch_dimap.storage.packing import bits_of, gather, pack_mask, packed_size, zeroed
from torch_dimap.storage.records import (
    KEY,
    Group,
    Operations,
    Pruned,
    Record,
    kept_name,
    mask_name,
    write_record,
)
from torch_dimap.storage.replacing import replacing


def write_weights(
    path: Path,
    entries: Mapping[str, Entry],
    content: str,
    *,
    map_: Map,
    cuts: Mapping[str, Cut] | None = None,
    group_of: Mapping[str, str] | None = None,
    thresholds: Mapping[str, float | None] | None = None,
    hashed: bool = False,
    operations: Operations | None = None,
    metadata: Mapping[str, str] | None = None,
    done: Callable[[int], Any] = lambda bytes: None,
) -> None:
    """Write a state dict, block by block, in place of a file.

    Args:
        path: the target, as ``check_target`` returned it.
        entries: what to write, by name.
        content: of the file, see :class:`torch_dimap.files.records.Record`.
        map_: how to work on all, see :func:`torch_dimap.selection.threaded_map`.
        cuts: what to prune of entries. The others' own masks hold.
        group_of: name of a pruned tensor -> its group.
        thresholds: group -> the highest score that went.
        hashed: note a SHA-256 of each pruned tensor's weights behind its mask.
        operations: what was done to the model's layers, see :class:`Record`.
        metadata: what to put beside the record, or to replace by it.
        done: called with the size of every tensor, in bytes, once it is written.

    Raises:
        ValueError: if a name of the file's own is taken.
        OSError: if the disk refuses.
    """
    cuts, group_of, thresholds = cuts or {}, group_of or {}, thresholds or {}
    kept = {
        name: cuts[name].kept if name in cuts else count_kept(entry)
        for name, entry in entries.items()
        if entry.masked or name in cuts
    }
    parts = {name: _parts(name, e.kind, kept.get(name), content) for name, e in entries.items()}
    kinds = {part: kind for own in parts.values() for part, kind in own.items()}
    if len(kinds) < sum(map(len, parts.values())):
        twice = Counter(part for own in parts.values() for part in own).most_common(1)[0][0]
        raise ValueError(
            f"{twice!r} is what the file has to call a mask or its values, and also the name of "
            "a tensor: rename that."
        )
    sizes = {name: entries[name].kind.size for name in kept}
    pruned = {
        name: Pruned(entries[name].kind, group_of.get(name), "0" * 64 if hashed else None)
        for name in kept
    }

    from torch_dimap import __version__  # which imports this file

    groups = _groups(kept, sizes, group_of, thresholds)
    crc32 = dict.fromkeys(kinds, 0)
    record = Record(content, __version__, pruned, groups, crc32, operations or {})
    others = {"format": "pt", **(metadata or {})}
    _, places = lay_out(kinds, {**others, KEY: write_record(record)})
    with replacing(path) as write:

        def write_one(name: str) -> tuple[str, dict[str, int], str | None]:
            own = {part: places[part].begin for part in parts[name]}
            found = _write_entry(write, name, entries[name], cuts.get(name), own, hashed)
            done(entries[name].kind.bytes)
            return name, *found

        for name, checksums, sha256 in map_(write_one, entries):
            record.crc32.update(checksums)
            if hashed and name in pruned:
                pruned[name] = pruned[name]._replace(sha256=sha256)
        # As long as the header that the places were computed for.
        write(lay_out(kinds, {**others, KEY: write_record(record)})[0], 0)


def _parts(name: str, kind: Kind, kept: int | None, content: str) -> dict[str, Kind]:
    """Return the tensors that stand for one entry in the file."""
    if kept is None or content == "dense":
        return {} if content == "masks" else {name: kind}
    mask = {mask_name(name): Kind(torch.uint8, (packed_size(kind.size),))}
    return mask if content == "masks" else {**mask, kept_name(name): Kind(kind.dtype, (kept,))}


def _groups(
    kept: Mapping[str, int],
    sizes: Mapping[str, int],
    group_of: Mapping[str, str],
    thresholds: Mapping[str, float | None],
) -> dict[str, Group]:
    """Describe the groups, in the order of their thresholds where these are known."""
    members: dict[str, list[str]] = {group: [] for group in [*thresholds, *group_of.values()]}
    for name in kept:
        if name in group_of:
            members[group_of[name]].append(name)
    return {
        group: Group(
            1 - sum(kept[name] for name in names) / max(1, sum(sizes[name] for name in names)),
            thresholds.get(group),
        )
        for group, names in members.items()
        if names
    }


def _write_entry(
    write: Callable[[Any, int], None],
    name: str,
    entry: Entry,
    cut: Cut | None,
    places: dict[str, int],
    hashed: bool,
) -> tuple[dict[str, int], str | None]:
    """Write one tensor's parts, each from its place on; return checksums, and the hash."""
    checksums = dict.fromkeys(places, 0)
    digest = hashlib.sha256()

    def append(part: str, values: np.ndarray) -> None:
        data = values.view(np.uint8).data
        if data.nbytes:
            write(data, places[part])
            checksums[part] = zlib.crc32(data, checksums[part])
            places[part] += data.nbytes

    for values, keep in _masked_blocks(entry, cut) if places else ():
        if hashed and keep is not None:
            digest.update(bits_of(values).view(np.uint8).data)
        if name in places:
            append(name, bits_of(values) if keep is None else zeroed(values, keep))
        elif keep is not None:
            append(mask_name(name), pack_mask(keep))
            if kept_name(name) in places:
                append(kept_name(name), gather(values, keep))
    return checksums, digest.hexdigest() if hashed else None


def _masked_blocks(entry: Entry, cut: Cut | None) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Yield an entry's values and what stays of them."""
    if cut is None:
        yield from entry.blocks()
    else:
        values, ranked = tee(entry.blocks())
        yield from zip((value for value, _ in values), apply_cut(ranked, cut))

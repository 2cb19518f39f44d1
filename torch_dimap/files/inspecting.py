"""What a checkpoint tells about its pruning: the table of ``torch-dimap inspect``."""

from __future__ import annotations

import os

from torch_dimap.files.operations import describe_operations
from torch_dimap.files.skeletons import group_names
from torch_dimap.storage import Entry, Weights, count_kept, open_weights
from torch_dimap.text import aligned

_CONTENTS = {
    "compressed": "masks and the values that they keep",
    "masks": "masks alone",
    "dense": "whole tensors, pruned or slimmed by this package",
    None: "a state dict",
}
_OF_MASKED = [
    "masked as torch does it, weight_orig and weight_mask: prune_like(model, file) readies a model",
    "for it. transformers' from_pretrained would fill these layers with random weights: give it",
    "what torch-dimap expand makes of this file or folder.",
]
_HEADER = ["group", "tensors", "weights", "kept", "density", "threshold"]


def inspect_checkpoint(path: str | os.PathLike[str]) -> str:
    """Describe a checkpoint: its groups, densities, thresholds and sizes.

    Args:
        path: of any kind that :func:`torch_dimap.prune_checkpoint` reads. Where there are no
            masks, a weight counts as kept if it is not zero.

    Returns:
        A table and a few lines, for people.

    Raises:
        ValueError: if it is no checkpoint, or is damaged.
        OSError: if it cannot be read.
    """
    with open_weights(path) as weights:
        groups = _groups(weights)
        rows = [_row(group, [weights.entries[n] for n in names], weights)
                for group, names in groups.items()]  # fmt: skip
        sizes = sum(entry.kind.bytes for entry in weights.entries.values())
        on_disk = sum(os.path.getsize(file) for file in weights.files)
        record = weights.record
        hashes = {pruned.sha256 for pruned in record.pruned.values()} if record else {None}
    slim = describe_operations(record.operations) if record else []
    table = aligned([_HEADER, *rows], left=1) if rows else [] if slim else ["no groups are known"]
    lines = [
        f"{os.fspath(path)}: {_CONTENTS[record.content if record else None]}"
        + (f", written by torch_dimap {record.version}" if record else ""),
        *table,
        *slim,
        f"{len(weights.entries):,} tensors; {on_disk:,} bytes on disk, "
        f"{on_disk / max(1, sizes):.1%} of the {sizes:,} bytes of "
        + ("the masked tensors" if record and record.content == "masks" else "whole tensors"),
    ]
    if record is None and any(entry.masked for entry in weights.entries.values()):
        lines += _OF_MASKED
    if hashes != {None}:
        lines.append("the weights behind the masks are known by SHA-256")
    return "\n".join(lines)


def _groups(weights: Weights) -> dict[str, list[str]]:
    """Return the groups that the file tells, or those that its names speak of."""
    if weights.record is None:
        return group_names(weights.entries)
    groups: dict[str, list[str]] = {group: [] for group in weights.record.groups}
    for name, pruned in weights.record.pruned.items():
        groups.setdefault(pruned.group or "(none)", []).append(name)
    return groups


def _row(group: str, entries: list[Entry], weights: Weights) -> list[str]:
    total = sum(entry.kind.size for entry in entries)
    kept = sum(count_kept(entry) if entry.masked else _count_nonzero(entry) for entry in entries)
    asked = weights.record.groups.get(group) if weights.record else None
    threshold = asked.threshold if asked else None
    return [
        group,
        f"{len(entries):,}",
        f"{total:,}",
        f"{kept:,}",
        f"{kept / max(1, total):.4f}",
        "" if threshold is None else f"{threshold:.3e}",
    ]


def _count_nonzero(entry: Entry) -> int:
    return sum(int(values.count_nonzero()) for values, _ in entry.blocks())

"""What a file says about pruning: a JSON record in its metadata. See ``docs/format.md``."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch_dimap.storage.headers import NAMES, Kind, check_kind, parse_json

KEY = "torch_dimap"  # under which the metadata hold the record
CONTENTS = ("compressed", "masks", "dense")
Operations = dict[str, dict[str, int]]  # layer -> operation -> its number, "heads": that stay


class Pruned(NamedTuple):
    """One pruned tensor."""

    kind: Kind
    group: str | None = None  # which it was ranked with
    sha256: str | None = None  # of its weights before the mask was applied


class Group(NamedTuple):
    """What was asked of one group."""

    amount: float  # the fraction of its weights that is pruned
    threshold: float | None = None  # the highest score that went


class Record(NamedTuple):
    """All that a file tells about itself.

    Attributes:
        content: of :data:`CONTENTS`: masks and the values that they keep, masks alone,
            or whole tensors with zeros in them.
        version: of the package that wrote it.
        pruned: by the tensor's name in the state dict.
        groups: by name.
        crc32: stored tensor -> checksum of its bytes.
        operations: what was done to the dense model's layers. A file with some is of
            format 2, which readers of format 1 refuse; else it is of format 1.
    """

    content: str
    version: str
    pruned: dict[str, Pruned]
    groups: dict[str, Group]
    crc32: dict[str, int]
    operations: Operations = {}


def mask_name(name: str) -> str:
    """Return under which name a pruned tensor's mask is stored."""
    return f"{name}:mask"


def kept_name(name: str) -> str:
    """Return under which name the kept values of a pruned tensor are stored."""
    return f"{name}:kept"


def write_record(record: Record) -> str:
    """Return a record as JSON; its length does not depend on the checksums."""
    pruned = {
        name: {
            "dtype": NAMES[item.kind.dtype],
            "shape": item.kind.shape,
            "group": item.group,
            "sha256": item.sha256,
        }
        for name, item in record.pruned.items()
    }
    data = {
        "format": 2 if record.operations else 1,
        "content": record.content,
        "version": record.version,
        "pruned": pruned,
        "groups": {name: group._asdict() for name, group in record.groups.items()},
        "crc32": {name: f"{checksum:08x}" for name, checksum in record.crc32.items()},
    }
    if record.operations:
        data["operations"] = record.operations
    return json.dumps(data, separators=(",", ":"))


def read_record(metadata: Mapping[str, str], path: str) -> Record | None:
    """Read and check the record of a file; None if it has none.

    Raises:
        ValueError: if it is not sound, or of a later format.
    """
    if KEY not in metadata:
        return None
    data = parse_json(metadata[KEY].encode(), f"{path}: the record {KEY!r}")
    if data.get("format") not in (1, 2) or type(data["format"]) is not int:
        raise ValueError(
            f"{path} must be of format 1 or 2, found {str(data.get('format'))[:20]}: read it "
            "with the version of torch_dimap that wrote it."
        )
    fields = {"format": int, "content": str, "version": str}
    fields |= {"pruned": dict, "groups": dict, "crc32": dict}
    fields |= {"operations": dict} if data["format"] == 2 else {}
    if {key: type(value) for key, value in data.items()} != fields:
        raise ValueError(f"{path} must have a record of {', '.join(fields)}, found other fields.")
    if data["content"] not in CONTENTS:
        raise ValueError(
            f"{path} must hold one of {', '.join(CONTENTS)}, found {data['content'][:20]!r}."
        )
    return Record(
        data["content"],
        data["version"],
        {name: _pruned(item, f"{path}: {name!r}") for name, item in data["pruned"].items()},
        {name: _group(item, f"{path}: group {name!r}") for name, item in data["groups"].items()},
        {name: _hexadecimal(item, 8, f"{path}: crc32 of {name!r}")
         for name, item in data["crc32"].items()},
        _operations(data, path),
    )  # fmt: skip


def _pruned(item: Any, what: str) -> Pruned:
    if not isinstance(item, dict) or set(item) != {"dtype", "shape", "group", "sha256"}:
        raise ValueError(f"{what} must tell dtype, shape, group and sha256 in the record.")
    kind = check_kind(item["dtype"], item["shape"], what)
    if not kind.dtype.is_floating_point:
        raise ValueError(f"{what} must have a floating-point dtype to be pruned.")
    if not isinstance(item["group"], (str, type(None))):
        raise ValueError(f"{what} must have a group's name or null in the record.")
    if item["sha256"] is not None:
        _hexadecimal(item["sha256"], 64, f"{what}: sha256")
    return Pruned(kind, item["group"], item["sha256"])


def _group(item: Any, what: str) -> Group:
    numbers = {"amount", "threshold"}
    if not isinstance(item, dict) or set(item) != numbers or not _is_number(item["amount"]):
        raise ValueError(f"{what} must tell amount and threshold, numbers, in the record.")
    if item["threshold"] is not None and not _is_number(item["threshold"]):
        raise ValueError(f"{what} must have a number or null as threshold in the record.")
    return Group(item["amount"], item["threshold"])


def _operations(data: dict[str, Any], path: str) -> Operations:
    """Read what was done to layers; whether a model has them is seen when it is loaded."""
    if data["format"] == 1:
        return {}
    found = data["operations"]
    sound = all(
        isinstance(numbers, dict) and numbers and all(_is_count(n) for n in numbers.values())
        for numbers in found.values()
    )
    if not sound or not found or data["content"] == "masks":
        raise ValueError(
            f"{path} must tell, as a file of format 2 with values, layer -> operation -> a "
            "number that is not negative, in the record, found other operations."
        )
    return found


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_number(value: Any) -> bool:
    return type(value) is float and math.isfinite(value)


def _hexadecimal(text: Any, digits: int, what: str) -> int:
    if not isinstance(text, str) or len(text) != digits or set(text) - set("0123456789abcdef"):
        raise ValueError(f"{what} must be {digits} hexadecimal digits.")
    return int(text, 16)

"""State dicts that ``torch.save`` wrote, loaded without running code or reading values."""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import re
import sys
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torch_dimap.storage.headers import NAMES
from torch_dimap.storage.state_dicts import find_state_dict
from torch_dimap.text import name_some


def read_pickle(file: Path) -> dict[str, Tensor]:
    """Load the tensors of a state dict by name, mapped from the file where torch can.

    Files in torch's format from before 1.6, or of the other byte order, are loaded whole.

    Raises:
        ValueError: if ``torch.load(weights_only=True)`` refuses the file, or it holds
            anything else than plain tensors under the names of the state dict.
    """
    with _harmless_types():
        try:
            mapped = _can_be_mapped(file)
            saved = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
        except Exception as error:  # torch, pickle and zipfile each have their own
            # A damaged directory may send zipfile to a place before the file's begin.
            if isinstance(error, OSError) and error.errno != errno.EINVAL:
                raise
            raise ValueError(_what_is_wrong(file, error)) from error
    found = find_state_dict(saved, str(file))
    return {name: check_plain(value, f"{file}: {name!r}") for name, value in found.items()}


def _harmless_types() -> contextlib.AbstractContextManager[None]:
    """Let torch load what holds no code and is in many checkpoints: timm allows the same."""
    allow = getattr(torch.serialization, "safe_globals", None)  # torch 2.4 has none
    return allow([argparse.Namespace]) if allow else contextlib.nullcontext()


def _what_is_wrong(file: Path, error: Exception) -> str:
    """Say why torch refused a file; name the types that it did not let in."""
    ask = getattr(torch.serialization, "get_unsafe_globals_in_checkpoint", None)
    blocked: list[str] = re.findall(r"GLOBAL ([\w.]+) was not", str(error))
    with contextlib.suppress(Exception):  # of a damaged file, or one of the old format
        blocked = (ask(file) if ask else None) or blocked
    if not blocked:
        return (
            f"{file} must be a checkpoint, found what neither safetensors nor "
            f"torch.load(weights_only=True) can read ({type(error).__name__})."
        )
    names = ["".join(filter(str.isprintable, name))[:60] for name in blocked]
    return (
        f"{file} must hold plain tensors and numbers, found {name_some(names)}, which "
        "torch.load(weights_only=True) does not let in, since loading it may run code: where you "
        "trust the file, load it without weights_only and pass or save its state dict alone."
    )


def mapped_ranges(file: Path) -> list[tuple[int, int, int]]:
    """Say where a file is mapped: first and last address, and the offset in the file.

    Empty where the system does not tell, or torch did not map the file.
    """
    maps = Path("/proc/self/maps")
    if not maps.exists() or not zipfile.is_zipfile(file):
        return []
    path = os.path.realpath(file)
    lines = [line.split(maxsplit=5) for line in maps.read_text(errors="replace").splitlines()]
    ranges = [(*line[0].split("-"), line[2]) for line in lines if line[5:] == [path]]
    return [(int(low, 16), int(high, 16), int(offset, 16)) for low, high, offset in ranges]


def place_in_file(tensor: Tensor, mapped: list[tuple[int, int, int]]) -> int | None:
    """Return at which byte of the file a tensor's values lie in order, if they do."""
    begin = tensor.data_ptr()
    end = begin + tensor.numel() * tensor.element_size()
    if not tensor.is_contiguous() or begin == end:
        return None
    places = (begin - low + offset for low, high, offset in mapped if low <= begin and end <= high)
    return next(places, None)


def _can_be_mapped(file: Path) -> bool:
    if not zipfile.is_zipfile(file):
        return False
    with zipfile.ZipFile(file) as archive:
        names = [name for name in archive.namelist() if name.endswith("/byteorder")]
        return all(archive.open(name).read(10) == sys.byteorder.encode() for name in names)


def check_plain(tensor: Tensor, what: str) -> Tensor:
    """Refuse what is no plain tensor, or claims more entries than its file holds."""
    strange: Any = (
        tensor.layout != torch.strided
        or tensor.is_meta
        or tensor.dtype not in NAMES
        or type(tensor) not in (Tensor, torch.nn.Parameter)
    )
    if strange:
        raise ValueError(
            f"{what} must be a plain tensor with values, found one of {tensor.layout}, "
            f"{tensor.dtype} on {tensor.device}: make it dense and save it again."
        )
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise ValueError(
            f"{what} must not be larger than what is stored of it, found an expanded view: "
            "save a contiguous copy."
        )
    return tensor.detach().resolve_conj().resolve_neg()

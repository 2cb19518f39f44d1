"""State dicts that ``torch.save`` wrote, loaded without running code or reading values."""

from __future__ import annotations

import os
import sys
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torch_dimap.files.headers import NAMES

# Where training scripts put the state dict in a checkpoint; averaged weights first, as timm.
_HOLDERS = ("state_dict_ema", "model_ema", "state_dict", "model")
_WRAPPERS = ("_orig_mod.", "module.", "_orig_mod.")  # torch.compile, DDP, in either order


def read_pickle(file: Path) -> dict[str, Tensor]:
    """Load the tensors of a state dict by name, mapped from the file where torch can.

    Files in torch's format from before 1.6, or of the other byte order, are loaded whole.

    Raises:
        ValueError: if ``torch.load(weights_only=True)`` refuses the file, or it holds
            anything else than plain tensors under the names of the state dict.
    """
    try:
        mapped = _can_be_mapped(file)
        found = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    except OSError:
        raise
    except Exception as error:  # torch, pickle and zipfile each have their own
        raise ValueError(
            f"{file} must be a checkpoint, found what neither safetensors nor "
            f"torch.load(weights_only=True) can read ({type(error).__name__})."
        ) from error
    for holder in _HOLDERS:
        if isinstance(found, dict) and isinstance(found.get(holder), dict):
            found = found[holder]
            break
    items = found.items() if isinstance(found, dict) else ()
    return {
        _unwrapped(name): _checked(value, f"{file}: {name!r}")
        for name, value in items
        if isinstance(name, str) and isinstance(value, Tensor)
    }


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


def _unwrapped(name: str) -> str:
    for wrapper in _WRAPPERS:
        name = name.removeprefix(wrapper)
    return name


def _checked(tensor: Tensor, what: str) -> Tensor:
    """Refuse what is no plain tensor, or claims more entries than its file holds."""
    strange: Any = (
        tensor.layout != torch.strided
        or tensor.device.type != "cpu"
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

"""What a model is called with, out of what a user or a loader gives."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from torch_dimap.reconstruction.steps import map_tensors, tensors
from torch_dimap.text import name_some, warn

Call = tuple[tuple[Any, ...], dict[str, Any]]  # positional and named arguments


def read_batches(model: nn.Module, batches: Any, caller: str) -> list[Call]:
    """Turn batches into arguments of the model, without labels.

    Raises:
        TypeError: if ``batches`` or what it holds is of another kind.
        ValueError: if there is none, or one holds NaN or infinity.

    Warns:
        UserWarning: if all but the first entry of a tuple is left out, though it may be no label.
    """
    if isinstance(batches, (Tensor, Mapping, str)) or not isinstance(batches, Iterable):
        raise TypeError(
            f"{caller}: batches must be an iterable of batches, such as a DataLoader, found "
            f"{type(batches).__name__}: for a single batch give [batch]."
        )
    calls, doubtful = [], False
    for i, batch in enumerate(batches):
        doubtful = doubtful or _may_be_more(model, batch)
        call = _arguments(model, batch, f"{caller}: batches[{i}]")
        if not all(torch.isfinite(tensor).all() for tensor in tensors(call)):
            raise ValueError(f"{caller}: batches[{i}] holds NaN or infinity: leave it out.")
        if any(tensor.numel() for tensor in tensors(call)):  # others tell nothing
            calls.append(call)
    if not calls:
        raise ValueError(f"{caller}: batches is empty: give some images, say 128.")
    if doubtful:
        warn(
            f"{caller}: only the first entry of each batch is given to the model, the others are "
            "taken for labels: if they are none, give dicts of named arguments."
        )
    return calls


def to_device(call: Call, device: torch.device) -> Call:
    """Copy a call's tensors to where the model is, which may work on them in place."""
    return map_tensors(call, lambda tensor: tensor.to(device, copy=True))


def _arguments(model: nn.Module, batch: Any, where: str) -> Call:
    if isinstance(batch, Tensor):
        return (batch,), {}
    if isinstance(batch, Mapping):
        named = {name: value for name, value in batch.items() if name != "labels"}
        if not tensors(named):
            kinds = name_some(sorted({type(value).__name__ for value in named.values()}))
            raise TypeError(f"{where} must hold tensors, found {kinds or 'nothing'}.")
        return (), named
    if not isinstance(batch, (tuple, list)) or not batch:
        raise TypeError(
            f"{where} must be a tensor, a tuple or a dict to call the model with, found "
            f"{type(batch).__name__}."
        )
    return (tuple(batch[:1]) if _takes(model, 1) else tuple(batch)), {}


def _may_be_more(model: nn.Module, batch: Any) -> bool:
    """Say whether what is left out of a batch may be arguments of the model."""
    if not isinstance(batch, (tuple, list)) or not batch or not _takes(model, 1):
        return False
    first, *others = batch
    return _takes(model, len(batch)) and not all(_are_labels(first, x) for x in others)


def _are_labels(images: Any, labels: Any) -> bool:
    """Say whether something looks like a number, or no tensor, for each image."""
    if not isinstance(labels, Tensor):
        return not tensors(labels)
    numbers = labels.dim() == 1 and not labels.is_floating_point()
    return numbers and isinstance(images, Tensor) and images.shape[:1] == labels.shape


def _takes(model: nn.Module, count: int) -> bool:
    """Say whether a model can be called with so many positional arguments."""
    try:
        inspect.signature(model.forward).bind(*range(count))
    except TypeError:
        return False
    except ValueError:  # no signature to be had
        return True
    return True

"""What a model is called with, out of what a user or a loader gives."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from torch_dimap.reconstruction.steps import map_tensors, tensors

Call = tuple[tuple[Any, ...], dict[str, Any]]  # positional and named arguments


def read_batches(model: nn.Module, batches: Any, caller: str) -> list[Call]:
    """Turn batches into arguments of the model, without labels.

    Raises:
        TypeError: if ``batches`` or what it holds is of another kind.
        ValueError: if there is none, or one holds NaN or infinity.
    """
    if isinstance(batches, (Tensor, Mapping, str)) or not isinstance(batches, Iterable):
        raise TypeError(
            f"{caller}: batches must be an iterable of batches, such as a DataLoader, found "
            f"{type(batches).__name__}: for a single batch give [batch]."
        )
    calls = [_arguments(model, batch, f"{caller}: batches[{i}]") for i, batch in enumerate(batches)]
    if not any(tensor.numel() for tensor in tensors(calls)):
        raise ValueError(f"{caller}: batches is empty: give some images, say 128.")
    for i, call in enumerate(calls):
        if not all(torch.isfinite(tensor).all() for tensor in tensors(call)):
            raise ValueError(f"{caller}: batches[{i}] holds NaN or infinity: leave it out.")
    return calls


def to_device(call: Call, device: torch.device) -> Call:
    """Put a call's tensors where the model is."""
    return map_tensors(call, lambda tensor: tensor.to(device))


def _arguments(model: nn.Module, batch: Any, where: str) -> Call:
    if isinstance(batch, Tensor):
        return (batch,), {}
    if isinstance(batch, Mapping):
        return (), {name: value for name, value in batch.items() if name != "labels"}
    if not isinstance(batch, (tuple, list)) or not batch:
        raise TypeError(
            f"{where} must be a tensor, a tuple or a dict to call the model with, found "
            f"{type(batch).__name__}."
        )
    first, *others = batch
    if len(batch) == 2 and _are_labels(first, others[0]) and _takes(model, 1):
        return (first,), {}
    if not _takes(model, len(batch)) and _takes(model, 1):
        return (first,), {}
    return tuple(batch), {}


def _are_labels(images: Any, labels: Any) -> bool:
    """Say whether something looks like a number for each image."""
    return (
        isinstance(labels, Tensor)
        and labels.dim() == 1
        and not labels.is_floating_point()
        and isinstance(images, Tensor)
        and images.shape[:1] == labels.shape
    )


def _takes(model: nn.Module, count: int) -> bool:
    """Say whether a model can be called with so many positional arguments."""
    try:
        inspect.signature(model.forward).bind(*range(count))
    except TypeError:
        return False
    except ValueError:  # no signature to be had
        return True
    return True

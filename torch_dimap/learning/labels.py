"""Labels and classes, checked before they pick a row of a mask."""

from __future__ import annotations

import numbers
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from torch_dimap.text import name_some


def check_labels(labels: Any, num_classes: int, caller: str) -> None:
    """Refuse what tells no class, or shares of classes, for each image."""
    if not isinstance(labels, Tensor) or labels.is_complex() or labels.dtype == torch.bool:
        found = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        raise TypeError(f"{caller}: labels must be a tensor of numbers, found {found}.")
    hard = not labels.is_floating_point()
    fits = labels.dim() == 1 if hard else labels.shape[1:] == (num_classes,)
    if not fits:
        raise ValueError(
            f"{caller}: labels must be integers of the shape (images,) or shares of the shape "
            f"(images, {num_classes}), found {labels.dtype} of the shape {tuple(labels.shape)}."
        )
    if hard:
        wrong = labels[(labels < 0) | (labels >= num_classes)]
        if len(wrong):
            raise ValueError(
                f"{caller}: labels must lie between 0 and {num_classes - 1}, found {int(wrong[0])}."
            )
    elif not bool(((labels >= 0).all(1) & ((labels.float().sum(1) - 1).abs() < 0.02)).all()):
        raise ValueError(
            f"{caller}: the shares of an image's classes must be 0 or more and add up to 1, found "
            "others: pass what mixup returns, no logits."
        )


def check_classes(classes: Any, num_classes: int, caller: str) -> list[int]:
    """Return the classes as a list, once each is there and listed once."""
    if isinstance(classes, str) or not isinstance(classes, Iterable):
        raise TypeError(
            f"{caller}: classes must be an iterable of ints, found {type(classes).__name__}."
        )
    chosen = [int(c) if isinstance(c, numbers.Integral) else c for c in classes]
    wrong = [str(c) for c in chosen if not isinstance(c, int) or not 0 <= c < num_classes]
    if wrong or not chosen or len(set(chosen)) < len(chosen):
        raise ValueError(
            f"{caller}: classes must be different ints between 0 and {num_classes - 1}, at least "
            f"one, found {name_some(wrong or [str(c) for c in chosen]) or 'none'}."
        )
    return chosen

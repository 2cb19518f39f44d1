"""Models by timm's names and weights from files, for the command line; timm loads lazily."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from torch_dimap.files import open_weights, read_values, refuse_masks_alone
from torch_dimap.text import name_some


def build(name: str, pretrained: bool = False, **settings: Any) -> nn.Module:
    """Build a model of timm, in evaluation mode.

    Args:
        name: as timm knows it, with or without a tag.
        pretrained: load the weights that timm has for it; else they are random.
        settings: passed to ``timm.create_model``.

    Raises:
        ValueError: if timm has no such model; the message names similar ones.
        RuntimeError: if its weights cannot be had.
    """
    import timm

    if not name.startswith("hf-hub:") and not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3)
        raise ValueError(
            f"{name!r} must be a file or a model of timm, found neither: "
            + (f"did you mean {', '.join(near)}?" if near else "see timm.list_models().")
        )
    try:
        return timm.create_model(name, pretrained=pretrained, **settings).eval()
    except Exception as error:
        if not pretrained:
            raise
        # Offline, each version of the hub's client has its own kind of error.
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise RuntimeError(
            f"the pretrained weights of {name} cannot be had ({reason}): go online once, or do "
            "without them."
        ) from error


def read_weights(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read a checkpoint's weights, with all pruning that it carries baked in.

    Args:
        path: as for :func:`torch_dimap.files.open_weights`. Nothing in it is executed.

    Returns:
        Name -> tensor.

    Raises:
        ValueError: if the file holds no weights.
    """
    with open_weights(path) as weights:
        refuse_masks_alone(weights, os.fspath(path))
        return {name: read_values(entry) for name, entry in weights.entries.items()}


def load_weights(model: nn.Module, weights: Mapping[str, Tensor], path: str) -> None:
    """Copy weights into a model that has the same parameters; its buffers may differ.

    Raises:
        ValueError: if a parameter is missing in ``weights``, or of another shape.
    """
    own = dict(model.named_parameters())
    wrong = [key for key in own if key not in weights or weights[key].shape != own[key].shape]
    if wrong:
        raise ValueError(
            f"{path} must hold all parameters of {type(model).__name__}, found "
            f"{name_some(wrong)} missing or of another shape: name the model that the "
            "file was written from, with its number of classes."
        )
    state = model.state_dict()
    fitting = {k: v for k, v in weights.items() if k in state and state[k].shape == v.shape}
    model.load_state_dict(fitting, strict=False)

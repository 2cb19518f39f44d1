"""Models by timm's names and weights from files, for the command line; timm loads lazily."""

from __future__ import annotations

import argparse
import difflib
import os
from typing import Any

import torch
from torch import Tensor, nn

from torch_dimap.files import load_pruned
from torch_dimap.storage import open_weights, read_values, refuse_masks_alone
from torch_dimap.text import name_some


def add_source(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that name a model, or a file and the model that it is of."""
    parser.add_argument(
        "source",
        metavar="MODEL_OR_FILE",
        help="a model of timm by name, or a checkpoint: safetensors, what torch.save wrote, or a "
        "folder of the Hugging Face hub",
    )
    parser.add_argument(
        "--model", metavar="NAME", help="the timm model that the file's weights are of"
    )
    parser.add_argument(
        "--pretrained",
        action="store_true",
        help="load timm's weights for a model given by name (default: random weights)",
    )
    parser.add_argument("--num-classes", type=int, metavar="N", help="of the model's head")
    parser.add_argument(
        "--img-size",
        type=int,
        metavar="PIXELS",
        help="side of the image to count FLOPs for (default: the model's own)",
    )


def open_model(arguments: argparse.Namespace) -> nn.Module:
    """Build the model that the arguments name, with the weights of the file if there is one.

    Raises:
        ValueError: if they contradict each other, or the file does not fit the model.
    """
    source, name = arguments.source, arguments.model
    is_file = os.path.exists(source)
    if is_file and arguments.pretrained or bool(name) != is_file:
        raise ValueError(
            "--model and a file go together, and so do --pretrained and a model's name; "
            f"{source!r} is {'a file' if is_file else 'no file'}."
        )
    settings = {"num_classes": arguments.num_classes, "img_size": arguments.img_size}
    given = {key: value for key, value in settings.items() if value is not None}
    model = build(name or source, arguments.pretrained, **given)
    if is_file:
        load_weights(model, source)
    return model


def image_for(model: nn.Module, arguments: argparse.Namespace) -> Tensor:
    """Return a batch of one black image of the size that a model takes."""
    config: Any = getattr(model, "pretrained_cfg", {})
    channels, *sides = config.get("input_size", (3, 224, 224))
    size = [arguments.img_size] * 2 if arguments.img_size else sides
    return torch.zeros(1, channels, *size)


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


def load_weights(model: nn.Module, path: str) -> None:
    """Load a file into a dense model that has the same parameters; its buffers may differ.

    The file of a slim model makes the model slim.

    Raises:
        ValueError: if a parameter is missing in the file, or of another shape.
    """
    with open_weights(path) as weights:
        slim = weights.record is not None and weights.record.operations
    if slim:
        load_pruned(model, path)
        return
    state = read_weights(path)
    own = dict(model.named_parameters())
    wrong = [key for key in own if key not in state or state[key].shape != own[key].shape]
    if wrong:
        raise ValueError(
            f"{path} must hold all parameters of {type(model).__name__}, found "
            f"{name_some(wrong)} missing or of another shape: name the model that the "
            "file was written from, with its number of classes."
        )
    known = model.state_dict()
    fitting = {k: v for k, v in state.items() if k in known and known[k].shape == v.shape}
    model.load_state_dict(fitting, strict=False)

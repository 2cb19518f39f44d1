"""Models by timm's names and weights from files, for the command line; timm loads lazily."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn


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
        path: a ``.safetensors`` file, or what ``torch.save`` wrote: a state dict, or a
            dict that holds one as timm's checkpoints do. Nothing in it is executed.

    Returns:
        Name -> tensor; ``<name>_orig`` and ``<name>_mask`` are joined to ``<name>``.

    Raises:
        ValueError: if the file holds no weights.
    """
    from timm.models import load_state_dict

    try:
        found = load_state_dict(os.fspath(path), weights_only=True)
    except Exception as error:
        raise ValueError(
            f"{os.fspath(path)} must be a checkpoint, found what neither safetensors nor "
            f"torch.load(weights_only=True) can read ({type(error).__name__})."
        ) from error
    weights = {key: value for key, value in found.items() if isinstance(value, Tensor)}
    if not weights:
        raise ValueError(f"{os.fspath(path)} must hold a state dict, found no tensor in it.")
    for key in [key for key in weights if key.endswith("_mask")]:
        name = key.removesuffix("_mask")
        if f"{name}_orig" in weights:
            dense = weights.pop(f"{name}_orig")
            weights[name] = dense * weights.pop(key).to(dense.dtype)
    return weights


def load_weights(model: nn.Module, weights: Mapping[str, Tensor], path: str) -> None:
    """Copy weights into a model that has the same parameters; its buffers may differ.

    Raises:
        ValueError: if a parameter is missing in ``weights``, or of another shape.
    """
    own = dict(model.named_parameters())
    wrong = [key for key in own if key not in weights or weights[key].shape != own[key].shape]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ValueError(
            f"{path} must hold all parameters of {type(model).__name__}, found "
            f"{', '.join(wrong[:3])}{more} missing or of another shape: name the model that the "
            "file was written from, with its number of classes."
        )
    state = model.state_dict()
    fitting = {k: v for k, v in weights.items() if k in state and state[k].shape == v.shape}
    model.load_state_dict(fitting, strict=False)


def skeleton(weights: Mapping[str, Tensor]) -> nn.Module:
    """Build modules of the names and types that weights tell of, to group them by.

    They cannot run. A file does not tell parameters from buffers: every floating-point
    tensor counts as a parameter, but for the running statistics of batch norms.
    """
    own = {key: value for key, value in weights.items() if "." not in key}
    below: dict[str, dict[str, Tensor]] = {}
    for key, value in weights.items():
        child, dot, rest = key.partition(".")
        if dot:
            below.setdefault(child, {})[rest] = value
    module = _shell(own)
    for name, value in own.items():
        if value.is_floating_point() and not name.startswith("running_"):
            module.register_parameter(name, nn.Parameter(value, requires_grad=False))
    for child, theirs in below.items():
        module.add_module(child, skeleton(theirs))
    return module


def _shell(own: Mapping[str, Tensor]) -> nn.Module:
    """Return an empty module of the type that its own tensors speak of."""
    if "in_proj_weight" in own or "q_proj_weight" in own:
        attention = nn.MultiheadAttention(1, 1, device="meta")
        for name in list(attention._parameters):
            del attention._parameters[name]
        del attention.out_proj
        return attention
    shape = own["weight"].shape if "weight" in own else ()
    if len(shape) == 2:
        return nn.Linear(shape[1], shape[0], bias=False, device="meta")
    if len(shape) == 4:
        return nn.Conv2d(shape[1], shape[0], (shape[2], shape[3]), bias=False, device="meta")
    return nn.Module()

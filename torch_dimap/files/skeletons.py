"""Modules rebuilt from the names and shapes of weights, to group those without their model."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from torch_dimap.masking import Rule, group_parameters
from torch_dimap.storage import Entry

# Floating-point buffers of vision transformers, which a file does not tell from parameters:
# statistics, the mask of shifted windows, tables of coordinates, rotary frequencies.
_BUFFERS = re.compile(r"running_\w+|\w*attn_mask|relative_coords_table|inv_freq|\w*freqs_cis")


def group_names(entries: Mapping[str, Entry], rule: Rule | None = None) -> dict[str, list[str]]:
    """Group the weights of a checkpoint as :func:`torch_dimap.group_parameters` groups a model's.

    Args:
        entries: the checkpoint's, in order.
        rule: as there. It sees modules of the right types and sizes, without values.

    Returns:
        Group -> names of weights, in the order of ``entries`` within a module.

    Raises:
        ValueError: as there; also for names that no model can have.
    """
    shells: dict[object, Tensor] = {}  # one for all names of a tied weight
    for name, entry in entries.items():
        shell = torch.empty(entry.kind.shape, dtype=entry.kind.dtype, device="meta")
        if shell.is_floating_point():
            shell = nn.Parameter(shell, requires_grad=False)
        shells.setdefault(entry.memory or name, shell)
    try:
        model = skeleton({name: shells[e.memory or name] for name, e in entries.items()})
    except (KeyError, RecursionError) as error:
        raise ValueError(
            f"the names of the weights must be those of a model's state dict, found others: {error}"
        ) from error
    places = {module: name for name, module in model.named_modules()}
    return {
        group: [".".join(filter(None, (places[module], name))) for module, name in pairs]
        for group, pairs in group_parameters(model, rule).items()
    }


def skeleton(weights: Mapping[str, Tensor]) -> nn.Module:
    """Build modules of the names and types that weights tell of, to group them by.

    They cannot run. A file does not tell parameters from buffers: every floating-point
    tensor counts as a parameter, but for those with the names of known buffers.
    """
    own = {key: value for key, value in weights.items() if "." not in key}
    below: dict[str, dict[str, Tensor]] = {}
    for key, value in weights.items():
        child, dot, rest = key.partition(".")
        if dot:
            below.setdefault(child, {})[rest] = value
    module = _shell(own)
    for name, value in own.items():
        if value.is_floating_point() and not _BUFFERS.fullmatch(name):
            if not isinstance(value, nn.Parameter):
                value = nn.Parameter(value, requires_grad=False)
            module.register_parameter(name, value)
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

"""Attentions replaced by convolutions of their weights, or by nothing."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from torch_dimap.families import slim_class
from torch_dimap.masking import all_or_nothing, pruned_tensors, refuse_sharded_model
from torch_dimap.operations.modules import (
    TAPS,
    Operation,
    PlainConvolution,
    SharedConvolution,
    Skip,
)
from torch_dimap.operations.sites import Site, find_sites
from torch_dimap.text import name_some

OPERATIONS = ("attention", "conv3", "conv1", "skip")  # from the dearest to the cheapest
SKIPS = ("zero", "norm")
CALL = "collapse_convolutions()"


class WholeMap(nn.Module):
    """A Swin block that gives its map to what is in the attention's place, without windows."""

    attn: nn.Module

    def _attn(self, x: Tensor) -> Tensor:
        return self.attn(x)


def default_temperature(site: Site) -> float:
    """Return the authors' temperature of the heads' shares: for ViTs 0.01, for Swins 100."""
    return 1e-2 if site.window is None else 1e2


def replace_attentions(
    model: nn.Module,
    operations: Mapping[str, str],
    skip: str = "zero",
    temperature: float | None = None,
) -> nn.Module:
    """Replace attentions by convolutions made of their own weights, or by nothing.

    A convolution starts from the attention's value and output projections, with all heads
    mixed alike and a fresh batch norm, so train the model afterwards, and make optimizers
    and EMAs anew. Queries, keys and a relative position bias are dropped. In a Swin the
    convolution runs on the whole map, not inside windows. Tokens before those of the map,
    such as a class token, pass a convolution unchanged.

    Args:
        model: one of timm's ViTs or Swins, changed in place; unpruned.
        operations: name of an attention, such as ``"blocks.0.attn"`` -> ``"conv3"``, a 3x3
            bottleneck convolution, ``"conv1"``, a 1x1 one, or ``"skip"``; ``"attention"``
            leaves it as it is. Attentions that are not named stay.
        skip: what a skipped attention gives: ``"zero"``, or its own normalised input,
            ``"norm"``, as in the authors' fine-tuned models.
        temperature: of the softmax over heads; by default the authors', 0.01 for ViTs and
            100 for Swins.

    Returns:
        ``model``.

    Raises:
        TypeError, ValueError: for other models or attentions, unknown names or operations,
            attentions that were replaced before, or a ``skip`` or ``temperature`` out of
            range.
        RuntimeError: if attentions are pruned.

    Source: He et al., TPAMI 2024, arXiv 2111.11802.

    Example:
        >>> import timm, torch
        >>> vit = timm.create_model("vit_tiny_patch16_224", depth=2).eval()
        >>> _ = replace_attentions(vit, {"blocks.0.attn": "conv3"})
        >>> vit(torch.zeros(1, 3, 224, 224)).shape
        torch.Size([1, 1000])
    """
    caller = "replace_attentions()"
    sites = {site.name: site for site in find_sites(model, caller)}
    refuse_sharded_model(model, caller)
    wanted = _check(sites, operations, skip, temperature, caller)
    made = {
        name: _skip(sites[name], skip == "norm") if operation == "skip"
        else _shared(sites[name], operation, temperature or default_temperature(sites[name]))
        for name, operation in wanted.items()
    }  # fmt: skip
    with all_or_nothing([sites[name].block for name in made]):
        for name, module in made.items():
            put(sites[name], module)
    return model


def collapse_convolutions(model: nn.Module) -> nn.Module:
    """Turn convolutions that mix heads anew in every forward into plain ones, for deployment.

    Outputs stay the same up to rounding; parameters, and what optimizers and EMAs know of
    them, do not. Files take plain convolutions only.

    Returns:
        ``model``, changed in place.

    Raises:
        RuntimeError: if such a convolution has masks.
    """
    shared = {name: made for name, made in replaced_attentions(model).items()
              if isinstance(made, SharedConvolution)}  # fmt: skip
    places = tuple(f"{name}." for name in shared)
    pruned = [x.label for x in pruned_tensors(model, CALL) if x.label.startswith(places)]
    if shared and pruned:
        raise RuntimeError(
            f"{CALL}: convolutions must have no masks, found some on {name_some(pruned)}: call "
            "remove_all(model) first."
        )
    for name, made in shared.items():
        place, _, last = name.rpartition(".")
        setattr(model.get_submodule(place), last, made.collapsed())
    return model


def replaced_attentions(model: nn.Module) -> dict[str, Operation]:
    """Return what stands in the place of a model's attentions, by the attention's name.

    Each has its ``operation``, ``"conv3"``, ``"conv1"`` or ``"skip"``.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"replaced_attentions(): model must be an nn.Module, found {type(model).__name__}."
        )
    return {name: x for name, x in model.named_modules() if isinstance(x, Operation)}


def put(site: Site, module: nn.Module) -> None:
    """Put a module in an attention's place."""
    site.block.attn = module
    if site.window is not None:
        site.block.__class__ = slim_class(type(site.block), WholeMap)


def plain_operation(site: Site, operation: str, number: int) -> Operation:
    """Return an operation for a site, with any weights, ready to be filled from a file."""
    if operation == "skip":
        return _skip(site, bool(number))
    weight = site.attention.proj.weight
    return PlainConvolution(
        site.dim, number, 3 if TAPS[operation] == 9 else 1, site.grid, site.prefix_tokens,
        bias=site.attention.qkv.bias is not None, proj_bias=site.attention.proj.bias is not None,
        device=weight.device, dtype=weight.dtype,
    ).train(site.attention.training)  # fmt: skip


def _skip(site: Site, passes_on: bool) -> Skip:
    return Skip(site.grid, site.prefix_tokens, passes_on).train(site.attention.training)


def _shared(site: Site, operation: str, temperature: float) -> SharedConvolution:
    """Make a convolution of an attention's weights, as it starts."""
    attention, (weight, bias) = site.attention, site.values()
    factory: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype}
    value = nn.Linear(site.dim, len(weight), bias=bias is not None, **factory)
    with torch.no_grad():
        value.weight.copy_(weight)
        if bias is not None:
            value.bias.copy_(bias)
    made = SharedConvolution(
        value, attention.proj, torch.ones(site.heads, TAPS[operation], **factory),
        nn.BatchNorm2d(site.width, **factory), temperature, site.grid, site.prefix_tokens,
    )  # fmt: skip
    return made.train(attention.training)


def check_positive(name: str, value: Any, caller: str) -> None:
    """Refuse what is no finite number above 0."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{caller}: {name} must be a number, found {type(value).__name__}.")
    if not 0 < float(value) < math.inf:
        raise ValueError(f"{caller}: {name} must be greater than 0 and finite, found {value}.")


def _check(
    sites: Mapping[str, Site],
    operations: Mapping[str, str],
    skip: str,
    temperature: float | None,
    caller: str,
) -> dict[str, str]:
    """Return what is to be replaced by what, once all of it can be."""
    if not isinstance(operations, Mapping):
        raise TypeError(
            f"{caller}: operations must be a mapping attention -> operation, found "
            f"{type(operations).__name__}."
        )
    unknown = [str(name) for name in operations if name not in sites]
    if unknown:
        raise ValueError(
            f"{caller}: operations must name attentions of the model, {name_some(list(sites))}, "
            f"found {name_some(unknown)}."
        )
    for name, operation in operations.items():
        if operation not in OPERATIONS:
            raise ValueError(
                f"{caller}: the operation of {name} must be one of {', '.join(OPERATIONS)}, found "
                f"{operation!r}."
            )
    if skip not in SKIPS:
        raise ValueError(f"{caller}: skip must be one of {', '.join(SKIPS)}, found {skip!r}.")
    if temperature is not None:
        check_positive("temperature", temperature, caller)
    wanted = {name: op for name, op in operations.items() if op != sites[name].operation}
    replaced = [name for name in wanted if isinstance(sites[name].attention, Operation)]
    if replaced:
        raise ValueError(
            f"{caller}: attentions must still be there to be replaced, found "
            f"{name_some(replaced)} replaced before: start from the dense model."
        )
    return wanted

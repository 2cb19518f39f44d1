"""Forwards of a model that ``fully_shard`` has spread, which gather its weights themselves.

Its own hooks keep accounts of whole forwards and backwards, and neither expect a forward that is
left in its middle, nor other weights in the place of theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor, nn

from torch_dimap.masking import drop_hooks_of_shards, pruning_methods
from torch_dimap.reconstruction.steps import Swap, map_tensors, swapped
from torch_dimap.sharding import casts_inputs, gathering_methods, is_sharded, whole_of

Masked = dict[nn.Module, list[str]]  # a module -> which of its tensors have masks


def gather_in_forwards(model: nn.Module) -> None:
    """Let each module on which ``fully_shard`` was called gather its weights while it runs.

    Inside of :func:`torch_dimap.masking.untouched`, which undoes it. All processes must then make
    the same forwards.
    """
    units = {m: found for m in model.modules() if (found := gathering_methods(m))}
    casting = {unit for unit in units if casts_inputs(unit)}
    masked = {m: [x._tensor_name for x in pruning_methods(m)] for m in model.modules()}
    drop_hooks_of_shards(model)
    for unit, methods in units.items():
        held = {module: masked[module] for module in _without(unit, units.keys() - {unit})}
        for name, method in methods.items():
            vars(unit)[name] = _gathering(method, held, unit in casting)


def _without(module: nn.Module, others: set[nn.Module]) -> Iterator[nn.Module]:
    """Walk what is inside a module, but not what is inside of others there."""
    yield module
    for child in module.children():
        if child not in others:
            yield from _without(child, others)


def _gathering(method: Callable, held: Masked, casts: bool) -> Callable:
    @wraps(method)
    def gathering(*args: Any, **kwargs: Any) -> Any:
        wholes = list(_wholes(held))
        if casts and wholes:
            args, kwargs = map_tensors((args, kwargs), partial(_cast, like=wholes[0][2]))
        with swapped(wholes):
            return method(*args, **kwargs)

    return gathering


def _cast(tensor: Tensor, like: Tensor) -> Tensor:
    return tensor.to(like.dtype) if tensor.is_floating_point() else tensor


def _wholes(held: Masked) -> Iterator[Swap]:
    """Yield what some modules hold of the whole parameters, and the masked weights of these."""
    for module, masked in held.items():
        wholes = {
            name: nn.Parameter(whole_of(parameter.detach()), requires_grad=False)
            for name, parameter in module._parameters.items()
            if is_sharded(parameter)
        }
        for name, whole in wholes.items():
            yield module._parameters, name, whole
        for name in masked:
            if f"{name}_orig" in wholes:  # others keep the hook that puts it there
                mask = whole_of(module.get_buffer(f"{name}_mask"))
                yield vars(module), name, torch.where(mask != 0, wholes[f"{name}_orig"], 0.0)

"""Masks put on modules the way torch does it, and taken off: all of a call's, or none."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from torch_dimap.masking.layers import Layer, pruning_methods
from torch_dimap.masking.readers import known_readers
from torch_dimap.masking.sharded import ShardedMask, drop_after, stop_dropping
from torch_dimap.sharding import is_sharded, managed_names, rename, spread


def attach(
    layer: Layer,
    method: prune.BasePruningMethod,
    mask: Tensor,
    managed: Mapping[tuple[nn.Module, str], Any] | None = None,
) -> None:
    """Do to one module what torch's ``BasePruningMethod.apply`` does once it has a mask.

    ``fully_shard`` is told the parameter's new name; ``managed`` is what it manages, where that
    is known already.

    Unlike torch's, the parameter keeps its place among those of its module: optimizers
    save their state by place.
    """
    _, module, name = layer
    orig, before = layer.parameter, layer.method
    managed = managed_names([module]) if managed is None else managed
    method._tensor_name = name
    if before is None:
        with _in_place(module, name, f"{name}_orig"):
            module.register_parameter(f"{name}_orig", orig)
            del module._parameters[name]
    else:
        hooks = module._forward_pre_hooks
        hooks.pop(next(key for key, hook in hooks.items() if hook is before))
    rename(managed, module, name, f"{name}_orig")  # torch's own masks have not told it
    if is_sharded(orig):
        mask = spread(mask, orig)
    if before is not None or is_sharded(orig):
        kind = ShardedMask if is_sharded(orig) else prune.PruningContainer
        method = _container(kind, [*_methods(before), method])
    # Without a graph the module can be copied, for an EMA, right away; and tensors made in
    # inference mode could never again be changed outside of it.
    with torch.inference_mode(False), torch.no_grad():
        if not orig.is_contiguous():  # a mask of another layout would slow every forward
            mask = torch.empty_like(orig, dtype=torch.bool).copy_(mask)
        elif mask.is_inference():
            mask = mask.clone()
        module.register_buffer(f"{name}_mask", mask)
        if isinstance(method, ShardedMask):
            method.rest(module)
        else:
            setattr(module, name, _product(method, mask, orig, module))
    module.register_forward_pre_hook(method)
    if (module, name) in managed or (module, f"{name}_orig") in managed:
        for user in (module, *known_readers([module])):
            drop_after(user)


def _product(
    method: prune.BasePruningMethod, mask: Tensor, orig: Tensor, module: nn.Module
) -> Tensor:
    """Return what ``method.apply_mask(module)`` returns, in the memory of the result alone."""
    if type(method).apply_mask is not prune.BasePruningMethod.apply_mask:
        return method.apply_mask(module)
    return mask.to(orig.dtype, copy=True).mul_(orig)


def show_masked(module: nn.Module) -> None:
    """Put masked values in the place of a module's pruned tensors, as its next forward will.

    Where masks are older than shards, only a forward can.
    """
    for method in pruning_methods(module):
        if isinstance(method, ShardedMask):
            method.rest(module)
        elif not is_sharded(getattr(module, f"{method._tensor_name}_orig")):
            setattr(module, method._tensor_name, method.apply_mask(module))


def bake(layer: Layer) -> None:
    """Call ``prune.remove``, but leave the parameter in its place."""
    _, module, name = layer
    if is_sharded(layer.parameter):  # masked before it was sharded: torch's own would undo that
        hooks = module._forward_pre_hooks
        key = next(key for key, hook in hooks.items() if hook is layer.method)
        hooks[key] = _container(ShardedMask, _methods(layer.method))
    with _in_place(module, f"{name}_orig", name), torch.inference_mode(False), torch.no_grad():
        prune.remove(module, name)
    stop_dropping(module)


@contextmanager
def _in_place(module: nn.Module, old: str, new: str) -> Iterator[None]:
    """Let a block put one parameter in for another, and give it the other's place."""
    parameters = module._parameters
    order = [new if key == old else key for key in parameters]
    yield
    entries = [(key, parameters[key]) for key in order]
    parameters.clear()
    parameters.update(entries)


def _methods(hook: prune.BasePruningMethod | None) -> list[prune.BasePruningMethod]:
    """Return a tensor's earlier methods."""
    return list(hook) if isinstance(hook, prune.PruningContainer) else [hook] if hook else []


def _container(
    kind: type[prune.PruningContainer], methods: Sequence[prune.BasePruningMethod]
) -> prune.PruningContainer:
    """Join methods, leaving each as it is."""
    container = kind(methods[0])
    for method in methods[1:]:
        container.add_pruning_method(method)
    return container


def snapshot(modules: Iterable[nn.Module]) -> Callable[[], None]:
    """Return what puts modules back as they are now: all but the values of tensors.

    That is their classes, their attributes, and what these hold in dicts and lists:
    parameters, buffers, hooks, and the list in which torch's recurrent layers keep their
    weights once more.
    """
    classes = {module: type(module) for module in modules}
    dicts, lists, empty = [], [], []
    for module in classes:
        for attribute in (vars(module), *vars(module).values()):
            if type(attribute) not in (dict, OrderedDict, list):
                continue
            if not attribute:  # as most are: a copy of each would take long in large models
                empty.append(attribute)
            elif type(attribute) is list:
                lists.append((attribute, attribute.copy()))
            else:
                dicts.append((attribute, dict(attribute)))

    names = [(info, info.param_name) for info in managed_names(classes).values()]

    def put_back() -> None:  # in place: hook handles refer to these very dicts
        for module, kind in classes.items():
            if type(module) is not kind:
                module.__class__ = kind
        for table, entries in dicts:
            table.clear()
            table.update(entries)
        for items, before in lists:
            items[:] = before
        for container in empty:
            container.clear()
        for info, name in names:
            info.param_name = name

    return put_back


@contextmanager
def all_or_nothing(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Put all modules back as they were if the block fails."""
    put_back = snapshot(modules)
    try:
        yield
    except BaseException:
        put_back()
        raise

"""Masks put on modules the way torch does it: all of a call's, or none."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from torch_dimap.masking.targets import Target


def attach(target: Target, method: prune.BasePruningMethod, mask: Tensor) -> None:
    """Do to one module what torch's ``BasePruningMethod.apply`` does once it has a mask."""
    module, name, orig = target.module, target.name, target.orig
    method._tensor_name = name
    if target.method is None:
        module.register_parameter(f"{name}_orig", orig)
        del module._parameters[name]
    else:
        hooks = module._forward_pre_hooks
        hooks.pop(next(key for key, hook in hooks.items() if hook is target.method))
        method = _container(target.method, method)
    if not orig.is_contiguous():  # a mask of another layout would slow every forward
        mask = torch.empty_like(orig, dtype=torch.bool).copy_(mask)
    module.register_buffer(f"{name}_mask", mask)
    # Without a graph the module can be copied, for an EMA, right away.
    with torch.no_grad():
        setattr(module, name, method.apply_mask(module))
    module.register_forward_pre_hook(method)


def _container(
    old: prune.BasePruningMethod, new: prune.BasePruningMethod
) -> prune.PruningContainer:
    """Join a tensor's earlier methods and a new one, leaving the earlier as they are."""
    earlier = list(old) if isinstance(old, prune.PruningContainer) else [old]
    container = prune.PruningContainer(earlier[0])
    for method in [*earlier[1:], new]:
        container.add_pruning_method(method)
    return container


@contextmanager
def all_or_nothing(targets: list[Target], readers: list[nn.Module]) -> Iterator[None]:
    """Put all modules back as they were if the block fails."""
    before: list[tuple[MutableMapping, dict]] = [
        (table, dict(table))
        for module in dict.fromkeys([*(target.module for target in targets), *readers])
        for table in (module._parameters, module._buffers, module._forward_pre_hooks)
    ]
    weights = [(t, vars(t.module)[t.name]) for t in targets if t.name in vars(t.module)]
    try:
        yield
    except BaseException:
        for target in targets:
            vars(target.module).pop(target.name, None)
        for target, weight in weights:
            vars(target.module)[target.name] = weight
        for table, entries in before:  # in place: hook handles refer to these very dicts
            table.clear()
            table.update(entries)
        raise

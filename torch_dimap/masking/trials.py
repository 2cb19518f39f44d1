"""Forwards that only look at a model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from torch_dimap.masking.attaching import snapshot
from torch_dimap.masking.layers import pruning_methods
from torch_dimap.masking.sharded import ShardedMask, drop_gathered
from torch_dimap.sharding import gathers, is_sharded, managed_names


def stand_in_for_shards(model: nn.Module, caller: str) -> None:
    """Let forwards tell sizes where a process holds no values: inside of :func:`untouched`.

    Zeros of whole size, which take no memory, stand in for what ``fully_shard`` has spread, and
    its hooks, which would gather, are taken away.

    Raises:
        ValueError: for weights that a tensor-parallel plan has spread.
    """
    for name, module in model.named_modules():
        sharded = [key for key, value in module._parameters.items() if is_sharded(value)]
        known = managed_names([module]) if sharded else {}
        for key in sharded:
            if (module, key) not in known:
                raise ValueError(
                    f"{caller}: {name}.{key} is spread by a tensor-parallel plan, which a count "
                    "cannot follow: count on the model before parallelize_module."
                )
            values = module._parameters[key]
            whole = torch.zeros((), dtype=values.dtype, device=values.device).expand(values.shape)
            module._parameters[key] = nn.Parameter(whole, requires_grad=False)
        for method in [x for x in pruning_methods(module) if isinstance(x, ShardedMask)]:
            vars(module)[method._tensor_name] = getattr(module, f"{method._tensor_name}_orig")
    drop_hooks_of_shards(model)


def drop_hooks_of_shards(model: nn.Module) -> None:
    """Take away the hooks that gather and mask sharded weights: inside of :func:`untouched`."""
    for module in model.modules():
        masks = [x for x in pruning_methods(module) if isinstance(x, ShardedMask)
                 or is_sharded(getattr(module, f"{x._tensor_name}_orig"))]  # fmt: skip
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key, hook in list(hooks.items()):
                if hook in masks or hook is drop_gathered or gathers(hook):
                    del hooks[key]


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Let forwards in evaluation mode run, without gradients, then put back all they changed."""
    modules = [m for m in model.modules() if not isinstance(m, torch.jit.ScriptModule)]
    put_back = snapshot(modules)
    buffers = [(x, x.clone()) for x in model.buffers() if not is_sharded(x)]
    training = model.training
    fastpath, cache = torch.backends.mha.get_fastpath_enabled(), torch.is_autocast_cache_enabled()
    try:
        model.eval()
        torch.backends.mha.set_fastpath_enabled(False)  # one operator for a whole layer
        torch.set_autocast_cache_enabled(False)  # what it holds is foreign to these forwards
        with torch.no_grad():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)
        torch.set_autocast_cache_enabled(cache)
        try:
            model.train(training)  # some models clear caches here
        finally:  # whatever it raises
            put_back()
            for buffer, value in buffers:
                if not torch.equal(buffer, value):
                    buffer.copy_(value)

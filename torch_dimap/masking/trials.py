"""Forwards that only look at a model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from torch_dimap.masking.attaching import snapshot


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Let forwards in evaluation mode run, without gradients, then put back all they changed."""
    modules = [m for m in model.modules() if not isinstance(m, torch.jit.ScriptModule)]
    put_back = snapshot(modules)
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
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
        model.train(training)  # some models clear caches here
        put_back()
        for buffer, value in buffers:
            if not torch.equal(buffer, value):
                buffer.copy_(value)

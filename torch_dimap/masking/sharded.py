"""Masks of sharded weights: torch's container, with what a shard needs besides.

Mask and weight are DTensors of one layout, so their product needs no other process. That holds
between forwards, and in them for tensor-parallel plans. ``fully_shard`` gathers the weight for a
forward, and the mask is then gathered, too.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from torch_dimap.sharding import (
    gathered,
    is_sharded,
    laid_out,
    local_of,
    managed_names,
    rename,
    rest_sharded,
    spread,
)


class ShardedMask(prune.PruningContainer):
    """The pruning methods of one sharded tensor of a module."""

    resting: Tensor  # the shard that stands for the masked weight between forwards

    def rest(self, module: nn.Module) -> None:
        """Put the masked shard in the place of the weight, as it is between forwards."""
        orig = getattr(module, f"{self._tensor_name}_orig")
        own, mask = local_of(orig), local_of(getattr(module, f"{self._tensor_name}_mask"))
        self.resting = spread(mask.to(own.dtype).mul_(own), orig)
        setattr(module, self._tensor_name, self.resting)

    def apply_mask(self, module: nn.Module) -> Tensor:
        """Return the masked weight: whole in a forward, where it is gathered, else the shard."""
        orig = getattr(module, f"{self._tensor_name}_orig")
        mask = getattr(module, f"{self._tensor_name}_mask")
        if is_sharded(orig) and orig.placements == mask.placements:
            return orig * mask
        return torch.where(gathered(mask, orig), orig, 0.0)

    def remove(self, module: nn.Module) -> None:
        """Make the mask permanent, in the memory that the shard has."""
        name = self._tensor_name
        rest_sharded([module])  # of what is gathered a change would be lost
        orig, mask = module.get_parameter(f"{name}_orig"), module.get_buffer(f"{name}_mask")
        with torch.no_grad():
            local_of(orig).mul_(local_of(laid_out(mask, orig)))
        if hasattr(module, name):
            delattr(module, name)
        del module._parameters[f"{name}_orig"], module._buffers[f"{name}_mask"]
        module.register_parameter(name, orig)
        rename(managed_names([module]), module, f"{name}_orig", name)


def drop_gathered(module: nn.Module, inputs: Any, output: Any) -> None:
    """Put shards in the place of whole masked weights: a hook after a module's forward.

    Also of the layers inside of the module, which may be read without being called.
    """
    for layer in module.modules():
        for method in _sharded_masks(layer):
            setattr(layer, method._tensor_name, method.resting)


def drop_after(module: nn.Module) -> None:
    """Give a module this hook, unless it has it."""
    if drop_gathered not in module._forward_hooks.values():
        module.register_forward_hook(drop_gathered, always_call=True)


def stop_dropping(module: nn.Module) -> None:
    """Take the hook from a module without sharded masks inside."""
    if any(True for layer in module.modules() for _ in _sharded_masks(layer)):
        return
    for key in [key for key, hook in module._forward_hooks.items() if hook is drop_gathered]:
        del module._forward_hooks[key]
        module._forward_hooks_always_called.pop(key, None)


def _sharded_masks(module: nn.Module) -> Iterator[ShardedMask]:
    return (x for x in module._forward_pre_hooks.values() if isinstance(x, ShardedMask))

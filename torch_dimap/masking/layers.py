"""One prunable tensor, dense or behind a mask: what the folders above call a layer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from torch_dimap.sharding import (
    is_sharded,
    laid_out,
    layout_of,
    local_of,
    processes_of,
    rest_sharded,
)

Pair = tuple[nn.Module, str]  # as torch.nn.utils.prune takes it


class Layer(NamedTuple):
    """One tensor of a module. Its properties tell the state of the module when asked."""

    label: str  # for messages: the name in the model where that is known
    module: nn.Module
    name: str  # in the module, without the "_orig" of a pruned one

    @property
    def parameter(self) -> nn.Parameter:
        """The dense values; behind the mask where the tensor is pruned."""
        return getattr(self.module, self.name if self._mask is None else f"{self.name}_orig")

    @property
    def mask(self) -> Tensor | None:
        """The mask; laid out as the parameter where that is sharded."""
        return None if self._mask is None else laid_out(self._mask, self.parameter)

    @property
    def _mask(self) -> Tensor | None:
        return self.module._buffers.get(f"{self.name}_mask")

    @property
    def method(self) -> prune.BasePruningMethod | None:
        """The hook with which torch applies the mask."""
        methods = pruning_methods(self.module)
        return next((method for method in methods if method._tensor_name == self.name), None)

    @property
    def weight(self) -> Tensor:
        """The values that count: never the attribute, which is stale until a forward."""
        values, mask = self.parameter.detach(), self.mask
        return values if mask is None else values * mask.to(values.dtype)


def count_unpruned(layers: Sequence[Layer], caller: str) -> list[int]:
    """Return how many entries of each layer the masks keep, zeros included.

    Of sharded ones all processes must ask at once.
    """
    masks = [layer.mask for layer in layers]
    counts = iter(count_nonzero([mask for mask in masks if mask is not None], caller))
    return [layer.parameter.numel() if mask is None else next(counts)
            for layer, mask in zip(layers, masks)]  # fmt: skip


def count_nonzero(tensors: Sequence[Tensor], caller: str) -> list[int]:
    """Return how many entries of each tensor are not zero; of sharded ones over all processes."""
    counts = [int(local_of(tensor).count_nonzero()) for tensor in tensors]
    sharded = [i for i, tensor in enumerate(tensors) if is_sharded(tensor)]
    processes = processes_of((tensors[i] for i in sharded), caller)
    if processes is not None:
        here = [counts[i] * layout_of(tensors[i], False, caller).counts for i in sharded]
        for i, count in zip(sharded, processes.add(np.array(here, float))):
            counts[i] = int(count)
    return counts


def pruning_methods(module: nn.Module) -> list[prune.BasePruningMethod]:
    """Return the hooks with which torch prunes the tensors of one module."""
    hooks = module._forward_pre_hooks.values()
    return [hook for hook in hooks if isinstance(hook, prune.BasePruningMethod)]


def pruned_tensors(model: nn.Module, caller: str) -> Iterator[Layer]:
    """Yield a model's pruned tensors, under each of their names.

    Raises:
        RuntimeError: if one has a pruning hook, but no mask or no original.
    """
    rest_sharded(model.modules())
    for place, module in model.named_modules(remove_duplicate=False):
        for name in (method._tensor_name for method in pruning_methods(module)):
            label = f"{place}.{name}".removeprefix(".")
            if f"{name}_orig" not in module._parameters or f"{name}_mask" not in module._buffers:
                raise RuntimeError(
                    f"{caller}: {label} must have a parameter {name}_orig and a buffer "
                    f"{name}_mask, found not both: build the model again and load its weights."
                )
            yield Layer(label, module, name)


BEFORE_SHARDING = (
    "call it before fully_shard or a tensor-parallel plan, which keep what it does"
)


def refuse_sharded(
    tensors: Iterable[tuple[str, Tensor]], caller: str, remedy: str = BEFORE_SHARDING
) -> None:
    """Raise if this process holds only a part of a tensor, given by name, that it needs whole."""
    for name, tensor in tensors:
        if is_sharded(tensor):
            raise ValueError(
                f"{caller}: {name} is sharded (a DTensor), and the whole is needed: {remedy}."
            )


def refuse_sharded_model(model: nn.Module, caller: str) -> None:
    """Raise if this process holds only a part of a model, also where a forward has gathered it."""
    rest_sharded(model.modules())
    refuse_sharded(model.named_parameters(), caller)


def computed_by(module: nn.Module, name: str) -> tuple[str, str] | None:
    """Name what computes a tensor from other parameters, and torch's function to end that."""
    if parametrize.is_parametrized(module, name):
        return "a parametrization", "parametrize.remove_parametrizations"
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, SpectralNorm) and hook.name == name:
            return "spectral_norm", "remove_spectral_norm"
        if isinstance(hook, WeightNorm) and hook.name == name:
            return "weight_norm", "remove_weight_norm"
    return None

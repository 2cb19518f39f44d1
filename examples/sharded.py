"""A model spread over processes with fully_shard, and its states as those of a whole one."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor


def shard(model: nn.Module, device: str) -> nn.Module:
    """Spread a timm model's weights over all processes, block by block, in place."""
    mesh = init_device_mesh(device, (dist.get_world_size(),))
    for name, module in model.named_modules():
        if name.rpartition(".")[2] == "blocks":
            for block in module.children():
                fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def total(summed: Tensor) -> Tensor:
    """Return a sum over a tensor or over all shards of it: all processes must ask for it."""
    return summed.full_tensor() if isinstance(summed, DTensor) else summed


def whole(state: Any) -> Any:
    """Return a state with whole tensors in the place of shards, in the first process, on the CPU.

    All processes must call it. The others get nothing in place of such tensors, so that only
    the first has to have room for all of them.
    """
    if isinstance(state, DTensor):
        gathered = state.full_tensor()
        return gathered.cpu() if dist.get_rank() == 0 else None
    if isinstance(state, dict):
        return {key: whole(value) for key, value in state.items()}
    return [whole(value) for value in state] if isinstance(state, list) else state


def spread(state: dict[str, Any], model: nn.Module, optimizer: Any) -> dict[str, Any]:
    """Return a training's state with shards in the place of whole tensors, as the model has."""
    own = model.state_dict()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    of_optimizer = {
        i: {key: _like(value, parameters[i]) for key, value in values.items()}
        for i, values in state["optimizer"]["state"].items()
    }
    spread = {key: {name: _like(value, own[name]) for name, value in state[key].items()}
              for key in ("model", "ema") if state[key]}  # fmt: skip
    return {**state, **spread, "optimizer": {**state["optimizer"], "state": of_optimizer}}


def _like(value: Any, own: Tensor) -> Any:
    if isinstance(own, DTensor) and isinstance(value, Tensor) and value.shape == own.shape:
        return distribute_tensor(value.to(own.device), own.device_mesh, own.placements)
    return value

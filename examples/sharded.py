"""A model spread over processes with fully_shard, and its states as those of a whole one."""

from __future__ import annotations

import argparse
from typing import Any

import torch.distributed as dist
from methods import METHODS, UNITS
from torch import Tensor, nn


def why_not_sharded(options: argparse.Namespace) -> str:
    """Say why options of finetune.py need whole weights; nothing if they do not."""
    if options.method == UNITS:
        return "cannot mask whole units, which lie in several processes: leave it out"
    if METHODS[options.method][1] != "dimap":
        return (f"prunes by the DIMAP score, found --method {options.method}, which ranks whole "
                "tensors: choose another, or leave it out")  # fmt: skip
    return "takes --amp bfloat16 or none" if options.amp == "float16" else ""


def shard(model: nn.Module, device: str) -> nn.Module:
    """Spread a timm model's weights over all processes, block by block, in place."""
    from torch.distributed.device_mesh import init_device_mesh  # here, since not every torch has it
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device, (dist.get_world_size(),))
    for name, module in model.named_modules():
        if name.rpartition(".")[2] == "blocks":
            for block in module.children():
                fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def total(summed: Tensor) -> Tensor:
    """Return a sum over a tensor or over all shards of it: all processes must ask for it."""
    return summed.full_tensor() if hasattr(summed, "full_tensor") else summed


def whole(state: Any) -> Any:
    """Return a state with whole tensors in the place of shards, in the first process, on the CPU.

    All processes must call it. The others get nothing in place of such tensors, so that only
    the first has to have room for all of them.
    """
    if hasattr(state, "full_tensor"):
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
    shards = {key: {name: _like(value, own[name]) for name, value in state[key].items()}
              for key in ("model", "ema") if state[key]}  # fmt: skip
    return {**state, **shards, "optimizer": {**state["optimizer"], "state": of_optimizer}}


def _like(value: Any, own: Tensor) -> Any:
    if not hasattr(own, "full_tensor") or getattr(value, "shape", None) != own.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(own.device), own.device_mesh, own.placements)

"""Functions run in several processes with gloo, each on a CPU."""

from __future__ import annotations

import random

import pytest
import torch
import torch.distributed as dist
from scripts import in_forks
from torch import nn

fsdp = pytest.importorskip("torch.distributed.fsdp")
if not hasattr(fsdp, "fully_shard"):
    pytest.skip("this torch has fully_shard elsewhere", allow_module_level=True)

from torch.distributed.device_mesh import init_device_mesh  # noqa: E402
from torch.distributed.fsdp import fully_shard  # noqa: E402
from torch.distributed.tensor import Replicate, Shard, distribute_tensor  # noqa: E402


def start(rank, processes, address, work, *arguments):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=processes)
    try:
        work(*arguments)
        dist.barrier()
    finally:
        dist.destroy_process_group()


def in_processes(processes, tmp_path, work, *arguments):
    """Run a function everywhere; what fails in one process fails here."""
    meeting = tmp_path / "rendezvous"
    meeting.unlink(missing_ok=True)  # that of an earlier call
    address = f"file://{meeting}"
    in_forks(start, processes, processes, address, work, *arguments)


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


class Blocks(nn.Module):
    """Linears of some shapes, one after the other, on inputs cut or padded to fit."""

    def __init__(self, shapes, dtype=torch.float32):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(b, a, dtype=dtype) for a, b in shapes)

    def forward(self, x):
        for layer in self.layers:
            x = torch.relu(layer(nn.functional.pad(x, (0, layer.in_features - x.shape[-1]))))
        return x


def shard_fully(model, rng):
    """Call fully_shard on some of the blocks and on the whole, on one mesh or another."""
    world = dist.get_world_size()
    shape = rng.choice([(world,), (world // 2, 2)] if world > 2 else [(world,)])
    names = ("replicate", "shard")[-len(shape) :]
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    for layer in model.layers:
        if rng.random() < 0.5:
            fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def shard_by_plan(model, rng):
    """Spread the layers by rows or columns, as parallelize_module does."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
    for layer in model.layers:
        for name, tensor in list(layer.named_parameters()):
            dim = rng.choice([0, tensor.dim() - 1])
            setattr(layer, name, nn.Parameter(distribute_tensor(tensor.data, mesh, [Shard(dim)])))
    return model


def shard_in_both_ways(model, rng):
    """Spread by a plan, and then by fully_shard."""
    world = dist.get_world_size()
    mesh = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("dp", "tp"))
    for layer in model.layers:
        for name, tensor in list(layer.named_parameters()):
            where = rng.choice([Shard(0), Shard(tensor.dim() - 1), Replicate()])
            setattr(layer, name, nn.Parameter(distribute_tensor(tensor.data, mesh["tp"], [where])))
    return fully_shard(model, mesh=mesh["dp"])


WAYS = {"fully_shard": shard_fully, "plan": shard_by_plan, "both": shard_in_both_ways}


def random_model(seed, dtype, even=False):
    """Return a model whose layers differ in shape and scale, with ties and zeros among them."""
    rng = random.Random(seed)
    sizes = [8, 16, 24, 40, 64] if even else [1, 3, 8, 21, 24, 40, 64]
    shapes = [(rng.choice(sizes), rng.choice(sizes)) for _ in range(rng.randint(1, 5))]
    model = Blocks(shapes, dtype)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        values = torch.randn(parameter.shape, generator=generator) * 10 ** rng.uniform(-3, 3)
        kind = rng.randrange(4)
        if kind == 1:
            values = (values / values.abs().max() * 4).round()
        elif kind == 2:
            values = torch.where(torch.rand(values.shape, generator=generator) < 0.5, 0.0, values)
        parameter.data.copy_(values)
    return model


def swin():
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    return timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=32, patch_size=4, window_size=4, embed_dim=16,
        depths=(1, 2), num_heads=(1, 2), num_classes=4, drop_path_rate=0.0,
    )  # fmt: skip


def shard_blocks(model, **kwargs):
    """As users do: each block, then the rest."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for stage in model.layers:
        for block in stage.blocks:
            fully_shard(block, mesh=mesh, **kwargs)
    return fully_shard(model, mesh=mesh, **kwargs)

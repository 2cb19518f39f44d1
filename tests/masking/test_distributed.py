"""DistributedDataParallel over a pruned model, with two processes and gloo."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from backbones import build, images, outputs
from scripts import in_forks
from torch.nn.parallel import DistributedDataParallel

import torch_dimap

FAMILIES = ["swin", "torchvision swin", "torchvision vit"]
STEPS = 2


def pruned(family):
    model = build(family)
    groups = torch_dimap.group_parameters(model)
    torch_dimap.global_module_aware_unstructured(groups, amount=0.55)
    return model.train()


def train(model, parts):
    """Step on the mean of the gradients over the parts of a batch, as DDP takes it."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(STEPS):
        optimizer.zero_grad()
        (sum(outputs(model, part).square().sum() for part in parts) / len(parts)).backward()
        optimizer.step()


def work(rank, address):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    for family in FAMILIES:
        model = pruned(family)
        x = images(family, batch=4)
        if rank == 1:  # what it starts from is to come from rank 0, masks included
            with torch.no_grad():
                for p in model.parameters():
                    p.add_(1)
                for name, buffer in model.named_buffers():
                    if name.endswith("_mask"):
                        buffer.logical_not_()
        train(DistributedDataParallel(model), [x[rank::2]])
        alone = pruned(family)
        train(alone, [x[0::2], x[1::2]])
        torch.testing.assert_close(model.state_dict(), alone.state_dict(), rtol=1e-4, atol=1e-5)
        model.eval(), alone.eval()
        torch.testing.assert_close(outputs(model, x), outputs(alone, x), rtol=1e-4, atol=1e-5)
    wrapped = DistributedDataParallel(build("swinv2").train())
    train(wrapped, [x[rank::2]])  # dense, and then pruned alike on either side
    torch_dimap.global_module_aware_unstructured(
        torch_dimap.group_parameters(wrapped), amount=0.55
    )
    train(wrapped, [x[rank::2]])
    states = [None, None]
    dist.all_gather_object(states, wrapped.state_dict())
    torch.testing.assert_close(*states, rtol=0, atol=0)
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available(), reason="torch was built without torch.distributed")
def test_two_processes_train_like_one(tmp_path):
    in_forks(work, 2, f"file://{tmp_path}/rendezvous")

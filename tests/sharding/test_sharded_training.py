"""Sharded, masked models in training, beside the same models unsharded."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from processes import in_processes, shard_blocks, swin, whole
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.utils import prune

import torch_dimap
from torch_dimap import global_module_aware_unstructured, group_parameters, remove_all


def train(model, steps, sharded):
    """Step on one batch, of which each process of a sharded model has a part."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    images = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    here = images.chunk(dist.get_world_size())[dist.get_rank()] if sharded else images
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(here).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def masks_of(model):
    return {name: whole(x) for name, x in model.named_buffers() if name.endswith("_mask")}


def in_rounds():
    alone = swin()
    sharded = shard_blocks(copy.deepcopy(alone))
    for amount in (0.3, 0.5):
        thresholds = [
            global_module_aware_unstructured(group_parameters(model), amount=amount)
            for model in (alone, sharded)
        ]
        if amount == 0.5:
            sharded.set_grad_checkpointing()  # gathers and multiplies anew for the backward
        # In the second round the weights have been trained, in another order of sums.
        assert thresholds[0] == pytest.approx(thresholds[1], rel=1e-3)
        train(alone, 2, False), train(sharded, 2, True)
        state = {name: whole(x) for name, x in sharded.state_dict().items()}
        torch.testing.assert_close(state, alone.state_dict(), rtol=1e-3, atol=1e-4)
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(sharded(x), alone(x), rtol=1e-3, atol=1e-4)
    for module in sharded.modules():  # nothing whole is left between forwards
        if prune.is_pruned(module) and hasattr(module, "weight_mask"):
            assert module.weight.to_local().shape == module.weight_mask.to_local().shape
    remove_all(sharded), remove_all(alone)
    assert not prune.is_pruned(sharded)
    torch.testing.assert_close(sharded(x), alone(x), rtol=1e-3, atol=1e-4)
    train(sharded, 1, True)
    assert list(sharded.state_dict()) == list(swin().state_dict())
    assert not any(module._forward_hooks_always_called for module in sharded.modules())


@pytest.mark.parametrize("processes", [1, 2])
def test_pruned_in_rounds_and_trained_as_unsharded(processes, tmp_path):
    in_processes(processes, tmp_path, in_rounds)


def masked_first():
    """Masks that were there before fully_shard go on as shards."""
    alone = swin()
    global_module_aware_unstructured(group_parameters(alone), amount=0.3)
    sharded = shard_blocks(copy.deepcopy(alone), mp_policy=MixedPrecisionPolicy(torch.bfloat16))
    train(sharded, 1, True)
    before = masks_of(sharded)
    torch.testing.assert_close(before, masks_of(alone))
    global_module_aware_unstructured(group_parameters(sharded), amount=0.5)
    after = masks_of(sharded)
    assert not any((after[name] & ~before[name]).any() for name in before)
    train(sharded, 1, True)
    torch.testing.assert_close(masks_of(sharded), after)
    # On a mesh of CPUs nothing moves, but torch takes the way of offloading.
    offloaded = CPUOffloadPolicy(pin_memory=False)
    again = shard_blocks(copy.deepcopy(alone), offload_policy=offloaded)
    again(torch.randn(2, 3, 32, 32))
    for model in (alone, again):
        global_module_aware_unstructured(group_parameters(model), amount=0.6)
        remove_all(model)
    for (name, one), (_, other) in zip(again.state_dict().items(), alone.state_dict().items()):
        assert torch.equal(whole(one), other), name
    train(again, 1, True)


def test_masks_from_before_sharding_stay_and_grow(tmp_path):
    in_processes(2, tmp_path, masked_first)


def by_plan():
    torch.manual_seed(0)
    alone = nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 8))
    mesh = init_device_mesh("cpu", (2,))
    plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
    sharded = parallelize_module(copy.deepcopy(alone), mesh, plan)
    x = torch.randn(5, 12, generator=torch.Generator().manual_seed(1))
    for _ in range(2):
        for model in (alone, sharded):
            pairs = [(model[0], "weight"), (model[2], "weight")]
            global_module_aware_unstructured(pairs, amount=0.4)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            model(x).square().sum().backward()
            optimizer.step()
        torch.testing.assert_close(sharded(x), alone(x))
        torch.testing.assert_close(masks_of(sharded), masks_of(alone))
    for model in (alone, sharded):
        prune.remove(model[0], "weight")
        remove_all(model)
    torch.testing.assert_close(sharded(x), alone(x))


def test_tensor_parallel_plans_train_as_one_process(tmp_path):
    in_processes(2, tmp_path, by_plan)


def refusals():
    rank = dist.get_rank()
    model = shard_blocks(swin())
    state = {name: x.to_local().clone() for name, x in model.state_dict().items()
             if hasattr(x, "to_local")}  # fmt: skip
    groups = group_parameters(model)

    def fails(error, match, call):
        with pytest.raises(error, match=match):
            call()
        assert not prune.is_pruned(model)
        for name, x in model.state_dict().items():
            if name in state:
                torch.testing.assert_close(x.to_local(), state[name], equal_nan=True)

    own = [0.2, 0.4][rank]
    fails(ValueError, "make the same call",
          lambda: global_module_aware_unstructured(groups, amount=own))  # fmt: skip
    pairs = {"a": groups["mlp"][: 2 + rank]}
    fails(ValueError, "make the same call",
          lambda: global_module_aware_unstructured(pairs, amount=0.5))  # fmt: skip
    scores = {pair: torch.ones_like(pair[0].weight) for of in groups.values() for pair in of}
    if rank == 1:  # wrong in one process alone
        scores[groups["qkv"][0]].to_local().fill_(float("nan"))
    fails(ValueError, "importance_scores of .* holds NaN",
          lambda: global_module_aware_unstructured(groups, importance_scores=scores, amount=0.5))
    fails(ValueError, "pruning_method is not DimapUnstructured.*sharded",
          lambda: global_module_aware_unstructured(groups, prune.L1Unstructured, amount=0.5))
    bad = groups["proj"][1][0].weight.detach().to_local()
    if rank == 0:
        bad.view(-1)[0] = float("inf")
    name = next(n for n, m in model.named_modules() if m is groups["proj"][1][0])
    state[f"{name}.weight"] = bad.clone()
    for call in (
        lambda: global_module_aware_unstructured(groups, amount=0.5),
        lambda: torch_dimap.global_module_aware_structured(
            torch_dimap.group_units(model), amount=0.2),
    ):  # fmt: skip
        fails(ValueError, "holds NaN or infinite values", call)


def test_a_refusal_in_one_process_is_one_in_all(tmp_path):
    in_processes(2, tmp_path, refusals)

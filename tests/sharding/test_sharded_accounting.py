"""Scores, budgets, summaries and pictures of sharded models: those of the unsharded ones."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from processes import in_processes, shard_blocks, swin, whole
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Shard, distribute_tensor

import torch_dimap


def look_alike(make):
    alone = swin()
    sharded = shard_blocks(copy.deepcopy(alone))
    outcomes = [make(model) for model in (alone, sharded)]
    assert outcomes[0] == outcomes[1], outcomes
    for (name, one), (_, other) in zip(alone.state_dict().items(), sharded.state_dict().items()):
        assert torch.equal(one, whole(other)), name
    return sharded


def accounting():
    images = torch.zeros(1, 3, 32, 32)
    fixed = {"proj": 0.1}
    look_alike(lambda m: torch_dimap.prune_to_parameters(m, 0.7, fixed=fixed))
    look_alike(lambda m: torch_dimap.prune_to_flops(m, images, 0.6))
    sharded = look_alike(
        lambda m: torch_dimap.global_module_aware_unstructured(
            torch_dimap.group_parameters(m), amount={"qkv": 0.2, "proj": 0.3, "mlp": 400}
        )
    )
    dense = swin()
    torch_dimap.global_module_aware_unstructured(
        torch_dimap.group_parameters(dense), amount={"qkv": 0.2, "proj": 0.3, "mlp": 400}
    )
    for inputs in (None, images):
        tables = [torch_dimap.summarize(m, inputs).to_markdown() for m in (dense, sharded)]
        assert tables[0] == tables[1]
    assert torch_dimap.count_flops(dense, images) == torch_dimap.count_flops(sharded, images)
    if dist.get_rank() == 0:
        pytest.importorskip("matplotlib")
    torch_dimap.plot_histograms(sharded), torch_dimap.plot_masks(sharded)
    weight = dense.layers[0].blocks[0].attn.qkv.weight_orig
    shards = sharded.layers[0].blocks[0].attn.qkv.weight_orig
    assert torch.equal(torch_dimap.dimap_scores(weight), whole(torch_dimap.dimap_scores(shards)))
    pairs = torch_dimap.group_parameters(sharded)
    scores = {pair: torch_dimap.dimap_scores(getattr(pair[0], "weight_orig"))
              for of_group in pairs.values() for pair in of_group}  # fmt: skip
    torch_dimap.global_module_aware_unstructured(pairs, importance_scores=scores, amount=0.1)
    schedule = torch_dimap.PruningSchedule(pairs, 0.8, begin=0, end=4, every=2)
    for step in range(5):
        schedule.step(step)
    with pytest.raises(ValueError, match="is sharded"):
        torch_dimap.remove_units(sharded)


def test_accounting_is_that_of_the_unsharded_model(tmp_path):
    in_processes(2, tmp_path, accounting)


def groups_of_processes():
    """Weights on meshes of other processes are refused, on one of some of them pruned there."""
    rank = dist.get_rank()
    meshes = [DeviceMesh("cpu", ranks) for ranks in ([0, 1], [2])]
    torch.manual_seed(0)
    alone = nn.Linear(16, 8)
    if rank == 2:
        return
    layer = copy.deepcopy(alone)
    layer.weight = nn.Parameter(distribute_tensor(layer.weight.data, meshes[0], [Shard(1)]))
    for module in (alone, layer):
        torch_dimap.dimap_unstructured(module, "weight", 0.5)
    assert torch.equal(alone.weight_mask, whole(layer.weight_mask))
    partial = nn.Linear(4, 4)
    value = DTensor.from_local(torch.ones(4, 4), meshes[0], [Partial()])
    partial.weight = nn.Parameter(value)
    with pytest.raises(ValueError, match="spread as .*redistribute it"):
        torch_dimap.dimap_unstructured(partial, "weight", 0.5)


def test_only_the_processes_that_hold_parts_take_part(tmp_path):
    in_processes(3, tmp_path, groups_of_processes)

"""Sharded models as a caller may find them: still gathered, or after a forward that failed."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from processes import Blocks, in_processes, whole
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
from torch.nn.utils import prune

from torch_dimap import (
    DimapUnstructured,
    dimap_unstructured,
    global_module_aware_unstructured,
    prune_to_parameters,
    summarize,
)
from torch_dimap.sharding import processes_of


def models():
    """Return a model unsharded and sharded, of which a forward leaves the last layers gathered."""
    torch.manual_seed(0)
    alone = Blocks([(12, 12), (2, 12), (12, 2)])
    sharded = copy.deepcopy(alone)
    fully_shard(sharded.layers[0])
    return alone, fully_shard(sharded)


def pairs_of(model):
    return [(layer, "weight") for layer in model.layers]


def removed_by_hand():
    x = torch.ones(3, 12)
    alone, sharded = models()
    for model in (alone, sharded):
        global_module_aware_unstructured(pairs_of(model), amount=0.4)
        model(x)
        for layer in model.layers:
            prune.remove(layer, "weight")
    for one, other in zip(alone.layers, sharded.layers):
        assert torch.equal(one.weight, whole(other.weight))
    torch.testing.assert_close(sharded(x), alone(x))


def test_prune_remove_of_gathered_weights_holds(tmp_path):
    in_processes(2, tmp_path, removed_by_hand)


def masked_by_torch():
    x = torch.ones(3, 12)
    alone, sharded = models()
    for model in (alone, sharded):
        prune.identity(model.layers[0], "weight")  # fully_shard is not told of it
        global_module_aware_unstructured(pairs_of(model), amount=0.4)
        model(x).sum().backward()
    for one, other in zip(alone.layers, sharded.layers):
        torch.testing.assert_close(whole(other.weight_orig.grad), one.weight_orig.grad)
    torch.testing.assert_close(sharded(x), alone(x))


def test_layers_masked_by_torch_go_on(tmp_path):
    in_processes(2, tmp_path, masked_by_torch)


def tied():
    torch.manual_seed(0)
    sharded = Blocks([(12, 12), (12, 12)])
    sharded.layers[1].weight = sharded.layers[0].weight
    fully_shard(sharded)
    for _ in range(2):
        with pytest.raises(ValueError, match="tied to another .* fully_shard .*name that one"):
            dimap_unstructured(sharded.layers[1], "weight", amount=0.5)
        assert not prune.is_pruned(sharded)
        sharded(torch.ones(3, 12))
    dimap_unstructured(sharded.layers[0], "weight", amount=0.5)
    sharded(torch.ones(3, 12))


def test_tied_weights_are_refused_at_places_that_fully_shard_leaves(tmp_path):
    in_processes(2, tmp_path, tied)


def failed_forward():
    x = torch.ones(3, 12)
    alone, sharded = models()

    def fail(*_):
        raise KeyError

    for _ in range(2):  # without masks, and with
        hook = sharded.layers[2].register_forward_hook(fail)
        with pytest.raises(KeyError):
            sharded(x)
        hook.remove()
        for model in (alone, sharded):
            global_module_aware_unstructured(pairs_of(model), amount=0.4)
        for one, other in zip(alone.layers, sharded.layers):
            assert hasattr(other.weight_orig, "full_tensor")
            assert torch.equal(one.weight_mask, other.weight_mask.full_tensor())
        torch.testing.assert_close(sharded(x), alone(x))


def test_weights_that_a_failed_forward_left_gathered_are_pruned(tmp_path):
    in_processes(2, tmp_path, failed_forward)


def unlike_calls():
    rank = dist.get_rank()
    sharded = fully_shard(Blocks([(12, 12), (12, 12)]))
    pairs = pairs_of(sharded)
    scores = {pair: torch.ones(12, 12) for pair in pairs}
    wide = {pair: own.to([torch.float32, torch.float64][rank]) for pair, own in scores.items()}
    for mine, own in (
        (pairs[:: [1, -1][rank]], None), (pairs, [None, scores][rank]), (pairs, wide)
    ):  # fmt: skip
        with pytest.raises(ValueError, match="make the same call"):
            global_module_aware_unstructured(mine, importance_scores=own, amount=0.5)
    if rank:
        weight = sharded.layers[0].weight
        ones = torch.ones_like(weight.to_local(), dtype=torch.bool)
        mask = DTensor.from_local(ones, weight.device_mesh, weight.placements, run_check=False)
        prune.custom_from_mask(sharded.layers[0], "weight", mask)
    with pytest.raises(ValueError, match="make the same call"):
        global_module_aware_unstructured(pairs, amount=0.5)


def test_processes_that_list_other_layers_masks_or_scores_are_refused(tmp_path):
    in_processes(2, tmp_path, unlike_calls)


def wrong_pairs():
    rank = dist.get_rank()
    _, sharded = models()
    sharded(torch.ones(3, 12))  # leaves some of them gathered
    pairs = pairs_of(sharded)
    wrong = [*pairs[1:], (sharded.layers[0], "wieght")] if rank else pairs
    for listed in (wrong, iter(wrong), {"all": iter(wrong)}):
        with pytest.raises(ValueError, match="wieght.* must be a parameter of its module"):
            global_module_aware_unstructured(listed, amount=0.5)
    assert not prune.is_pruned(sharded)
    with pytest.raises(ValueError, match="wieght"):
        dimap_unstructured(sharded.layers[0], ["weight", "wieght"][rank], amount=0.5)
    for call in (summarize, lambda m, parameters: prune_to_parameters(m, 0.5, parameters)):
        with pytest.raises(ValueError, match="wieght"):
            call(sharded, parameters=wrong)
        with pytest.raises(ValueError, match="make the same call"):
            call(sharded, parameters=pairs[rank:])
    assert not prune.is_pruned(sharded)
    global_module_aware_unstructured(pairs, amount=0.5)  # all are at the same place again


def test_wrong_pairs_in_one_process_are_refused_in_all(tmp_path):
    in_processes(2, tmp_path, wrong_pairs)


def unlike_replicas():
    """What one process has changed on its own is no longer the weight of all."""
    torch.manual_seed(0)
    mesh = init_device_mesh("cpu", (2,))
    plain, replicated = nn.Linear(8, 6), nn.Linear(8, 6)
    sharded = fully_shard(nn.Linear(8, 6), mesh=mesh)
    replicated.weight = nn.Parameter(distribute_tensor(plain.weight.data, mesh, [Replicate()]))
    pairs = [(module, "weight") for module in (plain, replicated, sharded)]
    column = nn.Linear(1, 16)
    column.weight = nn.Parameter(torch.randn(16, 4)[:, 1:2])  # its entries lie apart
    global_module_aware_unstructured([*pairs, (column, "weight")], amount=0.2)
    for module, name in ((plain, r"\[0\]"), (replicated, r"\[1\]")):
        weight = module.weight_orig.detach()
        with torch.no_grad():
            (weight.to_local() if module is replicated else weight)[0, 0] += dist.get_rank()
        with pytest.raises(ValueError, match=name + ".*same values"):
            global_module_aware_unstructured(pairs, amount=0.2)
        with torch.no_grad():
            (weight.to_local() if module is replicated else weight)[0, 0] = 1.0
    with torch.no_grad():  # the same entries, in another order
        here = replicated.weight_orig.to_local()
        here[1] = here[1].roll(dist.get_rank())
    with pytest.raises(ValueError, match=r"\[1\].*same values"):
        global_module_aware_unstructured(pairs, amount=0.2)
    with torch.no_grad():
        here[1] = 1.0
    global_module_aware_unstructured(pairs, amount=0.2)


def test_replicas_that_differ_are_refused(tmp_path):
    in_processes(2, tmp_path, unlike_replicas)


def another_world(address):
    rank, processes = dist.get_rank(), dist.get_world_size()
    global_module_aware_unstructured(pairs_of(models()[1]), amount=0.5)
    dist.barrier()
    dist.destroy_process_group()
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=processes)
    _, sharded = models()
    weight = sharded.layers[0].weight
    assert processes_of([weight], "test")._group is dist.group.WORLD
    with pytest.raises(ValueError, match="t must be whole.*dimap_unstructured"):
        DimapUnstructured.apply(sharded.layers[0], "weight", amount=0.5)
    assert sharded.layers[0].weight is weight
    global_module_aware_unstructured(pairs_of(sharded), amount=0.5)


def test_a_process_group_made_anew_is_the_one_used(tmp_path):
    in_processes(2, tmp_path, another_world, f"file://{tmp_path}/another")


def flat():
    cpu = torch.device("cpu")
    model = FullyShardedDataParallel(Blocks([(12, 12)]), use_orig_params=True, device_id=cpu)
    with pytest.raises(ValueError, match="flat parameter of FullyShardedDataParallel.*fully_shard"):
        global_module_aware_unstructured(pairs_of(model.module), amount=0.5)


def test_flat_parameters_are_refused(tmp_path):
    in_processes(2, tmp_path, flat)

"""Heads and neurons of sharded models, next to those of the same models unsharded."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from processes import fully_shard, in_processes, init_device_mesh, swin, whole
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.utils import prune

import torch_dimap
from torch_dimap import global_module_aware_structured, group_units, learning

SIZE = 32
IMAGES = torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))


def vit():
    return pytest.importorskip("timm").create_model(
        "vit_tiny_patch16_224", img_size=SIZE, patch_size=8, embed_dim=48, depth=2, num_heads=3,
        num_classes=5,
    )  # fmt: skip


def built(name):
    torch.manual_seed(0)
    model = {"vit": vit, "swin": swin}[name]().eval()
    with torch.no_grad():
        for i, tensor in enumerate(model.parameters()):
            tensor.add_(torch.randn_like(tensor), alpha=0.02 * (1 + i % 3))
    return model


def blocks_of(model):
    return [m for m in model.modules() if type(m).__name__ in ("Block", "SwinTransformerBlock")]


def sharded(model, way):
    if way == "fully_shard":
        for block in blocks_of(model)[:-1]:
            fully_shard(block)
        return fully_shard(model)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    plan = {"fc1": ColwiseParallel(), "fc2": RowwiseParallel()}
    for block in blocks_of(model):
        parallelize_module(block.mlp, mesh, plan)
    return model


def same_masks(alone, other):
    expected = dict(alone.named_buffers())
    found = dict(other.named_buffers())
    assert expected.keys() == found.keys()
    masks = [name for name in expected if name.endswith("_mask")]
    assert masks
    for name in masks:
        assert torch.equal(expected[name], whole(found[name])), name


def compare(name, way, path):
    alone = built(name)
    other = sharded(copy.deepcopy(alone), way)
    for amount in ({"heads": 0.2, "neurons": 0.4}, {"heads": 1, "neurons": 0.5}):
        results = [
            global_module_aware_structured(group_units(model), amount, multiple=4)
            for model in (alone, other)
        ]
        assert results[0] == results[1]
        same_masks(alone, other)
        with torch.no_grad():
            expected, found = (whole(model(IMAGES)) for model in (alone, other))
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="save_pruned"):
        torch_dimap.remove_units(other)
    torch_dimap.save_pruned(other, path)  # the way out: what is left is cut elsewhere
    dist.barrier()
    fresh = torch_dimap.load_pruned(built(name), path, masked=True)
    slim = torch_dimap.remove_units(fresh)
    with torch.no_grad():
        torch.testing.assert_close(slim(IMAGES), expected, atol=1e-5, rtol=1e-4)


def all_of_it(folder):  # in one start of the processes, which takes most of the time
    for name, way in (("swin", "fully_shard"), ("vit", "fully_shard"), ("vit", "plan")):
        compare(name, way, folder / f"{name}_{way}.safetensors")
    random_units()
    budgets_and_wrong_calls()


def test_units_are_those_of_the_unsharded_model(tmp_path):
    in_processes(2, tmp_path, all_of_it, tmp_path)


def random_units():
    """One process draws, or each would mask something else."""
    alone = built("vit")
    other = sharded(copy.deepcopy(alone), "fully_shard")
    torch.manual_seed(dist.get_rank())
    masked = global_module_aware_structured(
        group_units(other), 0.3, multiple=1, pruning_method=prune.RandomUnstructured
    )
    told = [None] * dist.get_world_size()
    dist.all_gather_object(told, masked)
    assert told[0] == told[1]
    assert sum(x.pruned for x in masked.values()) == round(0.3 * 6) + round(0.3 * 384)
    for kind, layers in group_units(other).items():  # the parts of a unit in all processes
        for layer in layers:
            assert int(layer.unmasked().sum()) == masked[kind].kept[layer.name]


def budgets_and_wrong_calls():
    alone = built("vit")
    other = sharded(copy.deepcopy(alone), "fully_shard")
    for model in (alone, other):
        global_module_aware_structured(group_units(model), 0.4, multiple=4)
    left = [torch_dimap.summarize(model).to_dict() for model in (alone, other)]
    assert left[0] == left[1]
    counted = torch_dimap.summarize(other, IMAGES)
    assert counted.prunable.slim_flops is None and counted.prunable.flops.dense
    for call in (torch_dimap.prune_units_to_flops, torch_dimap.prune_units_to_latency):
        with pytest.raises(ValueError, match=f"{call.__name__}.*is sharded"):
            call(other, IMAGES, 0.6)
    before = {k: whole(v) for k, v in other.state_dict().items()}
    for first, rest in ((1.5, 0.5), (0.5, 0.25)):
        amount = rest if dist.get_rank() else first
        with pytest.raises(ValueError, match="amount|same call"):
            global_module_aware_structured(group_units(other), amount)
    with pytest.raises(ValueError, match="same call"):
        global_module_aware_structured(group_units(other), 0.5, minimum=1 + dist.get_rank())
    after = {k: whole(v) for k, v in other.state_dict().items()}
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)


def gathered():
    """A forward leaves the parameters of the outermost module whole in every process."""
    rank = dist.get_rank()
    model = fully_shard(built("vit"))
    model(IMAGES)
    torch.manual_seed(rank)
    neurons = group_units(model)["neurons"]
    with pytest.raises(ValueError, match="make the same call"):
        global_module_aware_structured(neurons, [0.25, 0.5][rank], multiple=1)
    for wrong, error in (([], "is empty"), (neurons * 2, "listed twice"), (["fc1"], "unit layers")):
        listed = {"neurons": neurons, "more": wrong} if rank else {"neurons": neurons}
        with pytest.raises((TypeError, ValueError), match=error):
            global_module_aware_structured(listed, 0.5)
    model(IMAGES)
    done = global_module_aware_structured(
        iter(neurons), 0.5, multiple=1, pruning_method=prune.RandomUnstructured
    )
    for name, mlp in ((f"blocks.{i}.mlp", block.mlp) for i, block in enumerate(model.blocks)):
        into, out = whole(mlp.fc1.weight_mask), whole(mlp.fc2.weight_mask)
        assert torch.equal(into, into[:, :1].expand_as(into))
        assert torch.equal(out, into[:, 0].expand_as(out))
        assert int(into[:, 0].sum()) == done["all"].kept[name]
    dense = fully_shard(built("vit"))
    names = [f"blocks.{i}" for i in range(len(model.blocks))]
    choices = learning.SinglePath(
        {f"{name}.attn": "attention" for name in names},
        {f"{name}.mlp": torch.ones(192, dtype=torch.bool) for name in names}, 0, 1.0,
    )  # fmt: skip
    for call in (
        lambda: torch_dimap.prune_units_to_latency(model, IMAGES, 0.5),
        lambda: torch_dimap.prune_units_to_flops(model, IMAGES, 0.5),
        lambda: torch_dimap.wanda_scores(model, [IMAGES]),
        lambda: learning.ClassMasks(model, group_units(model), num_classes=5),
        lambda: learning.SinglePathSearch(dense, target=0.5, steps=4),
        lambda: learning.replace_attentions(dense, {"blocks.0.attn": "conv1"}),
        lambda: learning.apply_single_path(dense, choices),
    ):
        model(IMAGES), dense(IMAGES)
        with pytest.raises(ValueError, match="is sharded"):
            call()
    model(IMAGES)
    misfits = torch_dimap.reconstruct(model, [IMAGES])
    assert sum(x.after for x in misfits.values()) < sum(x.before for x in misfits.values())


def test_gathered_models_are_masked_or_refused_as_sharded_ones(tmp_path):
    in_processes(2, tmp_path, gathered)

"""Kept weights of sharded models refitted: as those of whole ones on all processes' images."""

import random

import pytest
import torch
import torch.distributed as dist
from processes import (
    Blocks,
    in_processes,
    shard_blocks,
    shard_by_plan,
    shard_fully,
    shard_in_both_ways,
    swin,
    whole,
)
from torch import nn
from torch.distributed.fsdp import (
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)

import torch_dimap
from torch_dimap import global_module_aware_unstructured, group_parameters, reconstruct


def images_of(rank, batches=1):
    generator = torch.Generator().manual_seed(rank)
    return [torch.randn(4, 3, 32, 32, generator=generator) for _ in range(batches)]


def refit_both(plain, model, batches=1, tolerance=1e-4, **kwargs):
    """Refit one model sharded, and in the first process one whole on all images; compare.

    Returns what each call has returned; for the whole model nothing in other processes.
    """
    found = reconstruct(model, images_of(dist.get_rank(), batches), **kwargs)
    refitted = values(model)
    if dist.get_rank():
        return found, None
    images = [x for rank in range(dist.get_world_size()) for x in images_of(rank, batches)]
    dtype = next(plain.parameters()).dtype
    expected = reconstruct(plain, [x.to(dtype) for x in images], **kwargs)
    assert_near(refitted, values(plain), tolerance)
    return found, expected


def values(model):
    return {
        name.replace("module.", ""): whole(value).clone()
        for name, value in model.state_dict().items()
    }


def assert_near(refitted, like, tolerance=1e-4):
    for name, value in refitted.items():
        value, expected = value.double(), like[name].double()
        assert (value - expected).norm() <= tolerance * expected.norm(), name


def assert_alike(model, plain):
    """Run both; the whole one, which only the first process has refitted, only there."""
    x = images_of(7)[0]
    found = model(x)
    if dist.get_rank() == 0:
        torch.testing.assert_close(found, plain(x), rtol=1e-3, atol=1e-4)


def prune(model, amount=0.6):
    global_module_aware_unstructured(group_parameters(model), amount=amount)


def refit_alike(sequential, kwargs, batches=1):
    plain, model = swin(), shard_blocks(swin(), **kwargs)
    prune(plain)
    prune(model)
    before = values(model)
    found, expected = refit_both(plain, model, batches, sequential=sequential)
    for name, misfit in found.items():
        assert misfit.after < misfit.before
        if expected:
            assert misfit.before == pytest.approx(expected[name].before, rel=1e-3)
            assert misfit.after == pytest.approx(expected[name].after, rel=1e-3)
    after = values(model)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(name.endswith(("weight_orig", "bias")) for name in changed)
    for name in changed:  # what is behind a mask stays
        if name.endswith("weight_orig"):
            gone = before[name.replace("orig", "mask")] == 0
            assert torch.equal(before[name][gone], after[name][gone])


@pytest.mark.parametrize("sequential", [True, False])
def test_a_sharded_swin_becomes_what_a_whole_one_becomes(tmp_path, sequential):
    in_processes(2, tmp_path, refit_alike, sequential, {}, 2)


def test_shards_of_uneven_sizes_and_shards_that_stay_gathered(tmp_path):
    in_processes(3, tmp_path, refit_alike, True, {"reshard_after_forward": False})


def test_products_are_of_the_stored_weights_whatever_the_forward_casts_to(tmp_path):
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    in_processes(2, tmp_path, refit_alike, True, {"mp_policy": policy})


def trains_on():
    model, plain = shard_blocks(swin()), swin()
    prune(model)
    model(images_of(0)[0]).sum().backward()  # state of fully_shard's from an earlier training
    model.zero_grad()
    reconstruct(model, images_of(dist.get_rank()))
    whole_values = {k.removesuffix("_orig"): v for k, v in values(model).items() if "mask" not in k}
    masks = {k: v for k, v in values(model).items() if k.endswith("mask")}
    for name, mask in masks.items():
        whole_values[name.removesuffix("_mask")] *= mask
    plain.load_state_dict(whole_values)
    x = images_of(7)[0]
    with torch.no_grad():
        torch.testing.assert_close(model(x), plain(x), rtol=1e-4, atol=1e-5)
    model(x).square().sum().backward()
    plain(x).square().sum().backward()
    gradients = dict(plain.named_parameters())
    for name, parameter in model.named_parameters():
        expected = gradients[name.removesuffix("_orig")].grad
        if f"{name.removesuffix('_orig')}_mask" in masks:
            expected = expected * masks[f"{name.removesuffix('_orig')}_mask"]
        torch.testing.assert_close(whole(parameter.grad), expected, rtol=1e-3, atol=1e-4)
    assert torch_dimap.summarize(model).model.density < 1


def test_a_refitted_model_gives_and_learns_what_a_whole_one_does(tmp_path):
    in_processes(2, tmp_path, trains_on)


def random_shards(seeds):
    for seed in seeds:
        refit_random(seed)


def refit_random(seed):
    rng = random.Random(seed)
    sizes = [4, 9, 24, 33]
    shapes = [(rng.choice(sizes), rng.choice(sizes)) for _ in range(4)]
    torch.manual_seed(seed)
    plain = Blocks(shapes)
    torch.manual_seed(seed)
    model = shard_fully(Blocks(shapes), random.Random(seed))
    for each in (plain, model):
        layers = [(x, name) for x in each.layers for name in ("weight", "bias")]
        global_module_aware_unstructured(layers, amount=0.5)
    batches = [torch.randn(64, 33) for _ in range(2 * dist.get_world_size())]
    reconstruct(plain, batches)
    reconstruct(model, batches[dist.get_rank() :: dist.get_world_size()])
    assert_near(values(model), values(plain), 1e-3)


def test_random_shapes_and_meshes(tmp_path):
    in_processes(4, tmp_path, random_shards, range(3))


def list_of_modules(forwards):
    """fully_shard on several modules at once, fresh or after a forward."""
    plain, model = swin(), swin()
    prune(plain)
    fully_shard([*model.layers[1].blocks])
    fully_shard([model.layers[0], model.layers[1].downsample])
    fully_shard(model)
    prune(model)
    for _ in range(forwards):
        model(images_of(0)[0])
    refit_both(plain, model)
    assert_alike(model, plain)


@pytest.mark.parametrize("forwards", [0, 1])
def test_modules_that_are_sharded_together(tmp_path, forwards):
    in_processes(2, tmp_path, list_of_modules, forwards)


def masked_first(by_torch):
    """Masks that are older than the shards; a Linear is sharded by itself."""
    plain, model = swin(), swin()
    for each in (plain, model):
        if by_torch:
            for block in each.layers[1].blocks:
                torch.nn.utils.prune.l1_unstructured(block.mlp.fc1, "weight", amount=0.5)
        else:
            prune(each)
    fully_shard(model.layers[1].blocks[0].mlp.fc1)
    shard_blocks(model)
    refit_both(plain, model)
    assert_alike(model, plain)


@pytest.mark.parametrize("by_torch", [False, True])
def test_masks_that_are_older_than_the_shards(tmp_path, by_torch):
    in_processes(2, tmp_path, masked_first, by_torch)


class Tied(nn.Module):
    """An output that shares the weight of an inner layer, called by a method of another name."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.middle, self.last = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.last.weight = self.middle.weight

    def embed(self, x):
        return self.first(x).relu()

    def forward(self, x):
        return self.last(self.middle(x).relu())


class Outer(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = Tied()

    def forward(self, x):
        return self.inner(self.inner.embed(x))


def ties_and_methods():
    plain, model = Outer(), Outer()
    fully_shard(model.inner)
    fully_shard(model)
    register_fsdp_forward_method(model.inner, "embed")
    for each in (plain, model):
        global_module_aware_unstructured([(each.inner.first, "weight")], amount=0.5)
    torch.manual_seed(1)
    batches = [torch.randn(16, 6) for _ in range(2)]
    with torch.inference_mode():
        reconstruct(plain, batches)
        reconstruct(model, [batches[dist.get_rank()]])
    assert_near(values(model), values(plain))
    torch.testing.assert_close(model(batches[0]), plain(batches[0]), rtol=1e-4, atol=1e-5)


def test_ties_beside_the_masks_and_methods_that_gather(tmp_path):
    in_processes(2, tmp_path, ties_and_methods)


def casting():
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    plain, model = swin().bfloat16(), shard_blocks(swin().bfloat16(), mp_policy=policy)
    prune(plain)
    prune(model)
    refit_both(plain, model, tolerance=2e-2)


def test_inputs_are_cast_as_fully_shard_casts_them(tmp_path):
    in_processes(2, tmp_path, casting)


class Twice(Blocks):
    """A model that uses its first layer once more where its inputs are marked."""

    def forward(self, x):
        once = super().forward(x)
        return once + self.layers[0](x) if x[0, 0] == 0 else once


def one_fails_at_the_end():
    torch.manual_seed(0)
    model = fully_shard(Twice([(8, 8), (8, 8)]))
    global_module_aware_unstructured([(x, "weight") for x in model.layers], amount=0.5)
    own = [parameter.to_local().clone() for parameter in model.parameters()]
    batches = [torch.randn(16, 8) for _ in range(2)]
    if dist.get_rank() == 1:
        batches[1][0, 0] = 0
        with pytest.raises(RuntimeError, match="must be used alike in all batches"):
            reconstruct(model, batches)
    else:
        with pytest.raises(RuntimeError):
            reconstruct(model, batches)
    assert all(torch.equal(a, b.to_local()) for a, b in zip(own, model.parameters()))
    if dist.get_rank() == 1:
        raise SystemExit(3)  # which the other one is told of


def test_no_process_changes_weights_where_another_one_fails(tmp_path):
    with pytest.raises(torch.multiprocessing.ProcessExitedException, match="exit code 3"):
        in_processes(2, tmp_path, one_fails_at_the_end)


def units_too():
    plain, model = swin(), shard_blocks(swin())
    for each in (plain, model):
        torch_dimap.global_module_aware_structured(torch_dimap.group_units(each), amount=0.3)
    refit_both(plain, model)


def test_masked_units_are_made_up_for(tmp_path):
    in_processes(2, tmp_path, units_too)


def refusals():
    model = shard_blocks(swin())
    with pytest.raises(ValueError, match="must hold masked weights, found none"):
        reconstruct(model, images_of(0))
    prune(model)
    before = values(model)
    with pytest.raises(ValueError, match="equally many batches, found 1, 2:"):
        reconstruct(model, images_of(0, 1 + dist.get_rank()))
    bad = images_of(0, 2)
    if dist.get_rank() == 1:
        bad[1][0, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"batches\[1\] holds NaN"):  # in both
        reconstruct(model, bad)
    with pytest.raises(ValueError, match="another one in process 1"):
        reconstruct(model, images_of(0), damping=0.1 * (1 + dist.get_rank()))
    some = {"query": group_parameters(model)["qkv"][:1]}
    with pytest.raises(ValueError, match="another one in process 1"):
        reconstruct(model, images_of(0), groups=some if dist.get_rank() else None)

    def fails(*_):
        raise RuntimeError("the disk is full")

    handle = model.layers[1].blocks[1].register_forward_pre_hook(fails)
    with pytest.raises(RuntimeError, match="the disk is full"):
        reconstruct(model, images_of(0))
    handle.remove()
    after = values(model)
    assert all(torch.equal(before[name], after[name]) for name in before)
    reconstruct(model, images_of(0))
    for shard in (shard_by_plan, shard_in_both_ways):
        planned = shard(Blocks([(8, 8), (8, 8)]), random.Random(1))
        global_module_aware_unstructured([(x, "weight") for x in planned.layers], amount=0.5)
        with pytest.raises(ValueError, match="tensor-parallel plan, and whole layers are needed"):
            reconstruct(planned, [torch.randn(8, 8)])


def test_what_cannot_be_refitted_is_refused_in_all_processes(tmp_path):
    in_processes(2, tmp_path, refusals)

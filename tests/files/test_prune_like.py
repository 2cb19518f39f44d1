"""A model readied for a checkpoint, whatever is around either of them."""

from __future__ import annotations

import argparse
import copy

import pytest
import torch
from conftest import make_swin
from torch import nn

from torch_dimap import (
    global_module_aware_unstructured,
    group_parameters,
    load_pruned,
    prune_checkpoint,
    prune_like,
    remove_all,
    save_pruned,
)
from torch_dimap.files import inspect_checkpoint

BLOCKS = pytest.mark.skipif(
    not hasattr(torch.serialization, "safe_globals"), reason="torch 2.4 cannot let one type in"
)


@pytest.fixture
def trained(swin):
    """A model with masks on two of its groups."""
    groups = group_parameters(swin)
    global_module_aware_unstructured({g: groups[g] for g in ("qkv", "mlp")}, amount=0.5)
    return swin.eval()


class Around(nn.Module):
    """A model as an attribute of another, as in a LightningModule."""

    def __init__(self, name: str, model: nn.Module) -> None:
        super().__init__()
        self.add_module(name, model)
        if name not in ("module", "_orig_mod"):  # which hold nothing else
            self.loss = nn.Linear(3, 3)


def fresh() -> nn.Module:
    torch.manual_seed(1)  # other weights than the trained ones
    return make_swin().eval()


def masked_names(model: nn.Module) -> set[str]:
    return {key for key, _ in model.named_buffers() if key.endswith("weight_mask")}


def test_prune_like_masks_what_is_masked_there_and_no_more(trained):
    state = trained.state_dict()
    model = prune_like(fresh(), state)
    assert masked_names(model) == masked_names(trained)
    assert not any("proj" in name for name in masked_names(model) if "attn" in name)
    assert all(torch.equal(model.get_buffer(n), state[n]) for n in masked_names(trained))
    model.load_state_dict(state)


def test_prune_like_loads_no_weights_and_keeps_parameters_in_place(trained):
    model = fresh()
    before = list(model.parameters())
    values = [value.clone() for value in before]
    prune_like(model, trained.state_dict())
    assert all(new is old for new, old in zip(model.parameters(), before, strict=True))
    assert all(map(torch.equal, before, values))


def test_prune_like_takes_masks_off_for_a_dense_state(trained, images):
    state = fresh().state_dict()
    prune_like(trained, state).load_state_dict(state)
    assert not masked_names(trained)
    assert not any(module._forward_pre_hooks for module in trained.modules())
    torch.testing.assert_close(trained(images), fresh()(images), rtol=0, atol=0)


def test_prune_like_moves_masks_to_where_a_state_has_them(trained):
    other = fresh()
    global_module_aware_unstructured({"proj": group_parameters(other)["proj"]}, amount=0.25)
    prune_like(trained, other.state_dict()).load_state_dict(other.state_dict())
    assert masked_names(trained) == masked_names(other)


@pytest.mark.parametrize("name", ["model", "module", "net", "_orig_mod", "backbone"])
def test_prune_like_sees_through_a_prefix_on_either_side(trained, images, name):
    outer = Around(name, trained)
    assert masked_names(prune_like(fresh(), outer.state_dict())) == masked_names(trained)
    around = Around(name, fresh())
    prune_like(around, trained.state_dict())
    assert masked_names(around) == masked_names(outer)
    loaded = load_pruned(fresh(), outer.state_dict())  # without what is outside of the prefix
    torch.testing.assert_close(loaded(images), trained(images), rtol=0, atol=0)


def test_prune_like_sees_through_compiled_parts(trained):
    compiled = Around("net", torch.compile(fresh()))
    prune_like(compiled, Around("net", trained).state_dict())
    assert masked_names(compiled) == {
        name.replace("layers", "net._orig_mod.layers", 1) for name in masked_names(trained)
    }


def test_prune_like_takes_shared_readers_and_a_new_head(swin, trained):
    model = make_swin()
    model.reset_classifier(3)
    assert masked_names(prune_like(model, trained.state_dict())) == masked_names(trained)


def test_prune_like_refuses_a_checkpoint_that_fits_twice(trained):
    both = nn.ModuleDict({"query": make_swin(), "key": make_swin()})
    with pytest.raises(ValueError, match="in one way, found 2, through the prefixes key., query."):
        prune_like(both, trained.state_dict())
    with pytest.raises(ValueError, match=r"found 2, through the prefixes key.\*, query.\*"):
        prune_like(trained, both.state_dict())
    assert masked_names(trained)


def test_prune_like_refuses_what_does_not_fit_and_changes_nothing(trained):
    state = trained.state_dict()
    small = copy.deepcopy(state)
    for part in ("orig", "mask"):
        name = f"layers.1.blocks.0.mlp.fc1.weight_{part}"
        small[name] = small[name][:8]
    for broken, message in [
        (small, "found layers.1.blocks.0.mlp.fc1.weight not in it or of another shape"),
        ({"a.weight": torch.ones(2)}, "must hold weights of SwinTransformer, found none"),
        ({"epoch": 3, "optimizer": {}}, "found no tensor in it, but the keys epoch, optimizer"),
        ({}, "found no tensor in it"),
    ]:
        model = fresh()
        with pytest.raises(ValueError, match=message):
            prune_like(model, broken)
        assert not masked_names(model)
    for wrong in (None, 3, [state]):
        with pytest.raises(TypeError, match="must be a path or a state dict"):
            prune_like(fresh(), wrong)
    with pytest.raises(TypeError, match="must be an nn.Module"):
        prune_like(state, fresh())


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: {"state_dict": s},
        lambda s: {"model": s, "epoch": 3},
        lambda s: {"model_state_dict": s},
        lambda s: {"params": s, "params_ema": s},
        lambda s: {"net": s, "optimizer": {"state": {}}},
        lambda s: {"ema": {"decay": 0.9}, "model": {"state_dict": s}},
        lambda s: {"state_dict": {f"module._orig_mod.{k}": v for k, v in s.items()}},
        pytest.param(
            lambda s: {"args": argparse.Namespace(model="swin", lr=0.1), "state_dict": s},
            marks=BLOCKS,
        ),
    ],
)
def test_checkpoints_of_all_kinds_come_back(tmp_path, trained, images, wrap):
    path = tmp_path / "last.pth"
    torch.save(wrap(trained.state_dict()), path)
    model = load_pruned(fresh(), path, masked=True)
    torch.testing.assert_close(model(images), trained(images), rtol=0, atol=0)
    assert masked_names(model) == masked_names(trained)
    prune_checkpoint(path, tmp_path / "more.safetensors", 0.5)
    assert "weight_orig and weight_mask" in inspect_checkpoint(path)


def test_averaged_weights_come_first(tmp_path, trained):
    ema = fresh().state_dict()
    state = {"state_dict": trained.state_dict(), "state_dict_ema": ema}
    model = load_pruned(make_swin(), state)
    assert torch.equal(model.head.fc.weight, ema["head.fc.weight"])


class Recipe:
    """What a training script may put beside its weights."""


@BLOCKS
def test_a_blocked_type_is_named(tmp_path, trained):
    torch.save({"state_dict": trained.state_dict(), "recipe": Recipe()}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"found test_prune_like.Recipe, which .* pass or save"):
        prune_like(make_swin(), tmp_path / "a.pth")


@pytest.mark.parametrize(
    "extra",
    [
        {"layers.0.blocks.0.attn.qkv.weight": torch.ones(48, 16, dtype=torch.int8)},
        {"layers.0.blocks.0.attn.qkv.qweight": torch.ones(48, 2, dtype=torch.int32)},
        {"layers.0.blocks.0.attn.qkv.weight_scale": torch.ones(48)},
        {"layers.0.blocks.0.attn.qkv.weight.absmax": torch.ones(4)},
    ],
)
def test_a_quantised_file_is_refused_for_what_it_is(tmp_path, swin, extra):
    torch.save(swin.state_dict() | extra, tmp_path / "int8.pth")
    for call in (
        lambda: prune_checkpoint(tmp_path / "int8.pth", tmp_path / "out.safetensors", 0.5),
        lambda: load_pruned(make_swin(), tmp_path / "int8.pth"),
    ):
        with pytest.raises(ValueError, match="found a quantised checkpoint .*layers.0"):
            call()


def test_buffers_in_a_file_count_as_no_weights(tmp_path, swin, recwarn):
    state = swin.state_dict()
    for i in range(2):  # at high resolution they outnumber the weights
        state[f"layers.{i}.blocks.1.attn_mask"] = torch.zeros(400, 16, 16)
    torch.save(state, tmp_path / "swin.pth")
    prune_checkpoint(tmp_path / "swin.pth", tmp_path / "out.safetensors", 0.5)
    assert not recwarn.list


def test_load_pruned_gives_a_slim_model_through_a_prefix(tmp_path, swin, images):
    from torch_dimap import global_module_aware_structured, group_units, remove_units

    global_module_aware_structured(group_units(swin), amount={"heads": 0.25, "neurons": 0.5})
    remove_units(swin.eval())
    save_pruned(swin, tmp_path / "slim.safetensors")
    around = Around("model", make_swin().eval())
    with pytest.raises(ValueError, match="same tensors, found loss"):  # it has more than the file
        load_pruned(around, tmp_path / "slim.safetensors")
    del around.loss
    load_pruned(around, tmp_path / "slim.safetensors")
    torch.testing.assert_close(around.model(images), swin(images), rtol=0, atol=0)


def test_a_masked_model_given_its_own_baked_file(tmp_path, trained, images):
    torch.save(remove_all(copy.deepcopy(trained)).state_dict(), tmp_path / "baked.pth")
    state = torch.load(tmp_path / "baked.pth", weights_only=True)
    expected = trained(images)
    prune_like(trained, state).load_state_dict(state)
    torch.testing.assert_close(trained(images), expected, rtol=0, atol=0)


def test_masks_alone_find_the_part_that_they_belong_to(tmp_path, trained, images):
    dense = make_swin().eval()  # the weights behind the masks
    other = nn.Linear(4, 4)
    both = nn.ModuleDict({"net": trained, "other": other})
    torch.nn.utils.prune.l1_unstructured(other, "weight", 0.5)
    save_pruned(both, tmp_path / "masks.safetensors", masks_only=True)
    load_pruned(dense, tmp_path / "masks.safetensors", masked=True)
    torch.testing.assert_close(dense(images), trained(images), rtol=0, atol=0)


@pytest.mark.parametrize("call", [prune_like, load_pruned])
def test_masks_that_scale_are_refused_and_leave_the_model(call):
    net = nn.Sequential(nn.Linear(4, 3))
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    state = {"0.weight_orig": torch.ones(3, 4), "0.weight_mask": torch.full((3, 4), 0.5),
             "0.bias": torch.zeros(3)}  # fmt: skip
    with pytest.raises(ValueError, match="mask of '0.weight' must be of 0 and 1"):
        call(net, state)
    assert net.state_dict().keys() == before.keys()
    assert all(torch.equal(net.state_dict()[name], before[name]) for name in before)

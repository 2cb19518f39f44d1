"""Checkpoints pruned without their model, against the model pruned in memory."""

from __future__ import annotations

import os
import warnings
from functools import cache

import pytest
import safetensors.torch
import torch
from backbones import FAMILIES, build
from conftest import make_swin
from state_files import save
from torch import nn

from torch_dimap import (
    expand_checkpoint,
    global_module_aware_unstructured,
    group_parameters,
    load_pruned,
    prune_checkpoint,
    remove_all,
)
from torch_dimap.selection import (
    apply_cut,
    blocks_of,
    find_cuts_sparingly,
    read_weight,
    select,
)

pytestmark = pytest.mark.usefixtures("one_thread")


@cache
def in_memory(family, ties=False):
    """Return a family's state dict, the same pruned and baked, and the thresholds."""
    model = build(family)
    if ties:  # all scores of a layer are those of its neighbour: only the order decides
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(0.3)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        thresholds = global_module_aware_unstructured(group_parameters(model), amount=0.5)
    return state, remove_all(model).state_dict(), thresholds


def assert_equal_states(found, expected):
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("ties", [False, True], ids=["", "ties"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.filterwarnings("ignore:.*(no weight is left|are recognised)")
def test_prune_checkpoint_prunes_like_the_model(tmp_path, family, ties):
    state, baked, thresholds = in_memory(family, ties)
    for name, compressed in [("dense.safetensors", True), ("dense.pth", False)]:
        found = prune_checkpoint(
            save(state, tmp_path / name), tmp_path / f"{name}.out", 0.5, compressed=compressed
        )
        assert found == pytest.approx(thresholds, rel=1e-9)
        assert_equal_states(load_pruned(tmp_path / f"{name}.out"), baked)


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize(
    "name", ["a.safetensors", "a.safetensors.index.json", "a.pth", "a.bin", "legacy.pt", "ddp.pt"]
)
def test_prune_checkpoint_reads_every_kind_of_file(tmp_path, name, compressed):
    state, baked, _ = in_memory("swin")
    source = tmp_path / name
    if name == "legacy.pt":
        torch.save(state, source, _use_new_zipfile_serialization=False)
    elif name == "ddp.pt":
        wrapped = {f"module.{key}": value for key, value in state.items()}
        torch.save({"epoch": 3, "model": wrapped, "optimizer": {"lr": torch.ones(3)}}, source)
    else:
        save(state, source, shards=3)
    target = tmp_path / "out.safetensors"
    prune_checkpoint(source, target, 0.5, compressed=compressed)
    assert_equal_states(load_pruned(target), baked)
    if not compressed:  # any reader will do
        assert_equal_states(safetensors.torch.load_file(target), baked)


def test_prune_checkpoint_goes_on_from_masks_and_from_compressed_files(tmp_path):
    model = make_swin()
    global_module_aware_unstructured(group_parameters(model), amount=0.3)
    masked = {key: value.clone() for key, value in model.state_dict().items()}
    save(masked, tmp_path / "masked.pth")
    save(masked, tmp_path / "masked.safetensors")
    save(make_swin().state_dict(), tmp_path / "dense.safetensors")
    prune_checkpoint(tmp_path / "dense.safetensors", tmp_path / "packed.safetensors", 0.3,
                     compressed=True)  # fmt: skip
    global_module_aware_unstructured(group_parameters(model), amount=0.5)
    baked = remove_all(model).state_dict()
    save(masked, tmp_path / "masked.safetensors.index.json", shards=5)
    for source in ("masked.pth", "masked.safetensors", "masked.safetensors.index.json",
                   "packed.safetensors"):  # fmt: skip
        prune_checkpoint(tmp_path / source, tmp_path / "out", 0.5, compressed=True, force=True)
        assert_equal_states(load_pruned(tmp_path / "out"), baked)


@pytest.mark.parametrize("amount", [0.0, 1.0, 1234, {"qkv": 0.2, "proj": 7, "mlp": 0.9}])
@pytest.mark.filterwarnings("ignore:.*no weight is left")
def test_prune_checkpoint_takes_amounts_like_the_model(tmp_path, amount):
    model = make_swin()
    save(model.state_dict(), tmp_path / "dense.pth")
    global_module_aware_unstructured(group_parameters(model), amount=amount)
    prune_checkpoint(tmp_path / "dense.pth", tmp_path / "out", amount, compressed=True)
    assert_equal_states(load_pruned(tmp_path / "out"), remove_all(model).state_dict())


def test_prune_checkpoint_takes_a_rule_and_keeps_metadata(tmp_path):
    save(make_swin().state_dict(), tmp_path / "dense.safetensors")
    found = prune_checkpoint(
        tmp_path / "dense.safetensors",
        tmp_path / "out.safetensors",
        0.5,
        rule=lambda place, _, name: "all" if (place[-3:], name) == ("fc1", "weight") else None,
    )
    assert list(found) == ["all"]
    with safetensors.safe_open(tmp_path / "out.safetensors", "pt") as file:
        assert file.metadata()["made by"] == "a test"
    state = load_pruned(tmp_path / "out.safetensors")
    assert (state["layers.0.blocks.0.mlp.fc1.weight"] == 0).any()
    assert not (state["layers.0.blocks.0.mlp.fc2.weight"] == 0).any()


def test_expand_checkpoint_gives_the_dense_file(tmp_path):
    state, baked, _ = in_memory("swin")
    save(state, tmp_path / "dense.pth")
    prune_checkpoint(tmp_path / "dense.pth", tmp_path / "packed", 0.5, compressed=True)
    prune_checkpoint(tmp_path / "dense.pth", tmp_path / "whole", 0.5)
    expand_checkpoint(tmp_path / "packed", tmp_path / "expanded")
    for name in ("expanded", "whole"):
        assert_equal_states(safetensors.torch.load_file(tmp_path / name), baked)
    with pytest.raises(ValueError, match="must have masks to be expanded"):
        expand_checkpoint(tmp_path / "whole", tmp_path / "again")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("candidates", [0, 1000])
def test_find_cuts_sparingly_finds_the_same_with_few_candidates(dtype, candidates):
    generator = torch.Generator().manual_seed(0)
    weights = [(torch.randn(n, generator=generator) * (0.01 * (1 + n % 7))).to(dtype)
               for n in (200_000, 1, 150_001, 90_000)]  # fmt: skip
    for count in (1000, 200_000, 440_000):
        expected, threshold = select(weights, count)
        flat = [read_weight(blocks_of(weight, None), "weight") for weight in weights]
        found_cuts, found = find_cuts_sparingly(flat, count, candidates=candidates)
        assert found == pytest.approx(threshold, rel=1e-9)
        for cut, weight, keep in zip(found_cuts, flat, expected):
            mask = torch.cat(list(apply_cut(weight.blocks(), cut)))
            assert torch.equal(mask, keep) and cut.kept == int(keep.sum())


def test_prune_checkpoint_warns_of_a_layer_without_weights(tmp_path):
    save({"attn.qkv.weight": torch.ones(2, 2)}, tmp_path / "a.pth")
    with pytest.warns(UserWarning, match="no weight is left in attn.qkv.weight"):
        prune_checkpoint(tmp_path / "a.pth", tmp_path / "out", 1.0)


def test_prune_checkpoint_shows_a_bar_only_when_asked(tmp_path, capsys):
    save(make_swin().state_dict(), tmp_path / "dense.pth")
    prune_checkpoint(tmp_path / "dense.pth", tmp_path / "out", 0.5)
    assert capsys.readouterr() == ("", "")
    prune_checkpoint(tmp_path / "dense.pth", tmp_path / "out", 0.5, force=True, progress=True)
    assert "100%" in capsys.readouterr().err


@pytest.mark.parametrize(
    "state, message",
    [
        ({"fc.weight": torch.ones(2, 2)}, "no layer of"),
        ({"attn.qkv.weight": torch.full((2, 2), torch.nan)}, "attn.qkv.weight in .* holds NaN"),
        ({"attn.qkv.weight": torch.ones(1).expand(99, 99)}, "found an expanded view"),
        ({"attn.qkv.weight": torch.eye(3).to_sparse()}, "must be a plain tensor with values"),
        ({"a..b": torch.ones(2, 2)}, "must be those of a model's state dict"),
        ({"attn.q.weight": torch.ones(2, 2), "attn.q.weight.x": torch.ones(2)}, "must be those"),
        ({"a." * 5000 + "weight": torch.ones(2, 2)}, "must be those of a model's state dict"),
        ({"forward.weight": torch.ones(2, 2)}, "must be those of a model's state dict"),
        ({"attn.qkv.weight_orig": torch.ones(2), "attn.qkv.weight_mask": torch.ones(3)}, "mask of"),
        ({}, "found no tensor in it"),
    ],
)
@pytest.mark.filterwarnings("ignore:Validating sparse tensor invariants")
def test_prune_checkpoint_refuses_weights_that_it_cannot_rank(tmp_path, state, message):
    torch.save(state, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=message):
        prune_checkpoint(tmp_path / "a.pth", tmp_path / "out", 0.5)
    assert os.listdir(tmp_path) == ["a.pth"]


def test_prune_checkpoint_refuses_tied_weights(tmp_path):
    model = nn.ModuleDict({"attn": nn.ModuleDict({"q": nn.Linear(4, 4), "k": nn.Linear(4, 4)})})
    model["attn"]["k"].weight = model["attn"]["q"].weight
    torch.save(model.state_dict(), tmp_path / "tied.pth")
    with pytest.raises(ValueError, match="tied to attn.q.weight and attn.k.weight"):
        prune_checkpoint(tmp_path / "tied.pth", tmp_path / "out", 0.5)

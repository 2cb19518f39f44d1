"""Pruned models saved and loaded: every bit of them, in every form."""

from __future__ import annotations

import json

import pytest
import safetensors.torch
import torch
from conftest import make_swin
from torch import nn
from torch.nn.utils import prune

from torch_dimap import (
    global_module_aware_unstructured,
    group_parameters,
    load_pruned,
    remove_all,
    save_pruned,
)

DEVICES = [
    "cpu",
    pytest.param(
        "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
    ),
]
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(tensor: torch.Tensor) -> torch.Tensor:
    if not tensor.is_floating_point():
        return tensor.cpu()
    return tensor.detach().cpu().contiguous().view(INTEGERS[tensor.element_size()])


def assert_same_bits(found, expected):
    assert set(found) == set(expected)
    for name in expected:
        assert found[name].dtype == expected[name].dtype, name
        assert torch.equal(bits(found[name]), bits(expected[name])), name


@pytest.fixture
def pruned(swin):
    """A pruned model and its state dict once baked, without the -0.0 that torch multiplies."""
    thresholds = global_module_aware_unstructured(group_parameters(swin), amount=0.5)
    baked = {}
    for key, value in swin.state_dict().items():
        mask = swin.state_dict().get(key.replace("_orig", "_mask"))
        if key.endswith("_orig"):
            baked[key.removesuffix("_orig")] = torch.where(mask, value, torch.zeros(()))
        elif not key.endswith("_mask"):
            baked[key] = value
    return swin, baked, thresholds


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("device", DEVICES)
def test_load_pruned_gives_back_every_bit(tmp_path, device, dtype):
    layer = nn.Linear(33, 7, dtype=dtype, device=device)  # 231 entries: a last byte with padding
    with torch.no_grad():
        layer.weight[0, :4] = torch.tensor([-0.0, 0.0, -1.0, float("nan")])
    mask = torch.rand(7, 33, device=device) < 0.5
    mask[0, :4] = torch.tensor([True, True, False, True])
    prune.custom_from_mask(layer, "weight", mask)
    expected = {"bias": layer.bias, "weight": layer.weight_orig.masked_fill(~mask, 0.0)}
    save_pruned(layer, tmp_path / "layer.safetensors")
    assert_same_bits(load_pruned(tmp_path / "layer.safetensors", device=device), expected)
    fresh = nn.Linear(33, 7, dtype=dtype, device=device)
    load_pruned(fresh, tmp_path / "layer.safetensors")
    assert_same_bits(fresh.state_dict(), expected)


def test_load_pruned_bakes_a_fresh_model(tmp_path, pruned, images):
    swin, baked, _ = pruned
    save_pruned(swin, tmp_path / "swin.safetensors")
    fresh = make_swin()
    assert load_pruned(fresh, tmp_path / "swin.safetensors") is fresh
    assert_same_bits(fresh.state_dict(), baked)
    assert torch.equal(fresh.eval()(images), swin.eval()(images))


def test_load_pruned_makes_a_masked_model_that_trains(tmp_path, pruned, images):
    swin, baked, _ = pruned
    save_pruned(swin, tmp_path / "swin.safetensors")
    fresh = make_swin()
    parameters = set(fresh.parameters())
    load_pruned(fresh, tmp_path / "swin.safetensors", masked=True)
    assert set(fresh.parameters()) == parameters
    assert [key for key in fresh.state_dict() if "_mask" in key] == [
        key for key in swin.state_dict() if "_mask" in key
    ]
    optimizer = torch.optim.SGD(fresh.parameters(), lr=0.1, weight_decay=0.1)
    fresh(images).square().mean().backward()
    optimizer.step()
    zeros = {key: value == 0 for key, value in baked.items() if value.dim() == 2}
    fresh(images)
    after = remove_all(fresh).state_dict()
    assert not torch.equal(after["head.fc.weight"], baked["head.fc.weight"])
    assert all((after[key][zero] == 0).all() for key, zero in zeros.items() if zero.any())


def test_load_pruned_holds_masks_of_layers_that_are_read_and_never_called(tmp_path):
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    prune.l1_unstructured(attention.out_proj, "weight", amount=0.5)
    save_pruned(attention, tmp_path / "a.safetensors")
    fresh = nn.MultiheadAttention(8, 2, batch_first=True)
    load_pruned(fresh, tmp_path / "a.safetensors", masked=True)
    with torch.no_grad():
        fresh.out_proj.weight_orig.fill_(1.0)
    fresh(*[torch.randn(1, 3, 8)] * 3)
    assert int((fresh.out_proj.weight == 0).sum()) == 32


def test_masks_alone_belong_to_their_weights(tmp_path, pruned):
    swin, baked, _ = pruned
    path = tmp_path / "masks.safetensors"
    save_pruned(swin, path, masks_only=True)
    assert_same_bits(load_pruned(make_swin(), path).state_dict(), baked)
    masked = load_pruned(make_swin(), path, masked=True)
    assert_same_bits(masked.state_dict(), swin.state_dict())
    other = make_swin()
    with torch.no_grad():
        other.layers[1].blocks[0].mlp.fc1.weight[3, 3] += 1e-3
    before = {key: value.clone() for key, value in other.state_dict().items()}
    with pytest.raises(ValueError, match=r"layers\.1\.blocks\.0\.mlp\.fc1\.weight were made for"):
        load_pruned(other, path)
    assert_same_bits(other.state_dict(), before)
    with pytest.raises(ValueError, match="must hold weights, found masks alone"):
        load_pruned(path)


def test_the_file_is_safetensors_and_tells_of_itself(tmp_path, pruned):
    swin, baked, thresholds = pruned
    path = tmp_path / "swin.safetensors"
    save_pruned(swin, path, thresholds=thresholds, hash_weights=True)
    with safetensors.safe_open(path, "pt") as file:
        record = json.loads(file.metadata()["torch_dimap"])
        names = set(file.keys())
    assert record["format"] == 1 and record["content"] == "compressed"
    assert record["groups"]["mlp"] == {"amount": 0.5, "threshold": thresholds["mlp"]}
    for name, item in record["pruned"].items():
        assert {f"{name}:mask", f"{name}:kept"} <= names and name not in names
        assert item["shape"] == list(baked[name].shape) and item["dtype"] == "F32"
        assert item["group"] in thresholds and len(item["sha256"]) == 64
    assert {name for name in names if ":" not in name} == set(baked) - set(record["pruned"])


def test_save_takes_any_finite_number_as_threshold(tmp_path, pruned):
    swin, _, thresholds = pruned
    save_pruned(swin, tmp_path / "a", thresholds={**thresholds, "qkv": 0})
    load_pruned(tmp_path / "a")  # the record is strict about its numbers


@pytest.mark.parametrize(
    ("thresholds", "error", "message"),
    [
        ({"qkv": float("nan")}, ValueError, "must be a finite number, .* found nan"),
        ({"qkv": None}, ValueError, "must be a finite number, .* found None"),
        ({"heads": 0.1}, ValueError, r"for the groups \['qkv', 'proj', 'mlp'\], found 'heads'"),
        (0.5, TypeError, "mapping group -> threshold.*found float"),
    ],
)
def test_save_refuses_thresholds_that_say_nothing(tmp_path, pruned, thresholds, error, message):
    with pytest.raises(error, match=f"save_pruned.*{message}"):
        save_pruned(pruned[0], tmp_path / "a", thresholds=thresholds)
    assert not list(tmp_path.iterdir())


def test_tied_strided_and_integer_tensors_come_back(tmp_path):
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(6, 4)
            self.twice = nn.ModuleList([self.a, nn.Linear(4, 6)])
            self.twice[1].weight = nn.Parameter(torch.randn(4, 6).t())
            self.register_buffer("steps", torch.tensor(7))
            self.register_buffer("none", torch.empty(0, 3))
            self.register_buffer("on", torch.tensor([True, False]))

    model, fresh = Odd(), Odd()
    prune.l1_unstructured(model.a, "weight", amount=0.5)
    prune.custom_from_mask(model.twice[1], "weight", torch.rand(6, 4) < 0.75)
    save_pruned(model, tmp_path / "odd.safetensors")
    for masked in (False, True):
        fresh = load_pruned(Odd(), tmp_path / "odd.safetensors", masked=masked)
        assert fresh.twice[0] is fresh.a and int(fresh.steps) == 7 and fresh.on.tolist() == [1, 0]
        assert torch.equal(fresh.a.weight, model.a.weight)
        assert torch.equal(fresh.twice[1].weight, model.twice[1].weight)


def test_load_pruned_keeps_the_dtype_of_the_model(tmp_path, pruned):
    swin, baked, _ = pruned
    save_pruned(swin, tmp_path / "swin.safetensors")
    half = load_pruned(make_swin().half(), tmp_path / "swin.safetensors").state_dict()
    assert torch.equal(half["head.fc.weight"], baked["head.fc.weight"].half())


def test_save_pruned_refuses_what_it_cannot_save(tmp_path, pruned):
    path = tmp_path / "x.safetensors"
    with pytest.raises(TypeError, match="model must be an nn.Module, found dict"):
        save_pruned({}, path)
    with pytest.raises(ValueError, match="must have masks, found no pruned tensor"):
        save_pruned(make_swin(), path)
    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    tied[1].weight = tied[0].weight
    prune.l1_unstructured(tied[0], "weight", amount=0.5)
    with pytest.raises(ValueError, match="1.weight must not share its values with the pruned 0.w"):
        save_pruned(tied, path)
    named = nn.ModuleDict({"a": nn.Linear(2, 2)})
    prune.l1_unstructured(named["a"], "weight", amount=0.5)
    named["a"].register_buffer("weight:kept", torch.zeros(1))
    with pytest.raises(ValueError, match="'a.weight:kept' is what the file has to call"):
        save_pruned(named, path)
    layer = nn.Linear(2, 2)
    prune.l1_unstructured(layer, "weight", amount=0.5)
    layer.weight_mask.fill_(0.5)
    with pytest.raises(ValueError, match="mask of weight must hold 0 and 1 only"):
        save_pruned(layer, path)
    del layer._buffers["weight_mask"]
    with pytest.raises(RuntimeError, match="found not both"):
        save_pruned(layer, path)
    assert not list(tmp_path.iterdir())


def test_load_pruned_refuses_what_does_not_fit(tmp_path, pruned):
    swin, _, _ = pruned
    path = tmp_path / "swin.safetensors"
    save_pruned(swin, path)
    with pytest.raises(RuntimeError, match="must be dense, found layers.0.*pruned already"):
        load_pruned(swin, path)
    with pytest.raises(ValueError, match="same tensors, found .* and [0-9]+ more in one of them"):
        load_pruned(nn.Sequential(nn.Linear(2, 2)), path)
    with pytest.raises(ValueError, match="is on the meta device"):
        load_pruned(make_swin().to("meta"), path)
    with pytest.raises(TypeError, match="expected a path besides the model"):
        load_pruned(make_swin())
    with pytest.raises(TypeError, match="found dict in the model's place"):
        load_pruned({}, path)
    torch.save(make_swin().state_dict(), tmp_path / "dense.pth")
    with pytest.raises(ValueError, match="must have masks for masked=True"):
        load_pruned(make_swin(), tmp_path / "dense.pth", masked=True)
    with pytest.raises(FileNotFoundError):
        load_pruned(tmp_path / "nowhere")

"""The example that compares scores for whole units."""

from __future__ import annotations

import argparse
import csv
import sys

import compare_units
import pytest
import timm
import torch
import torch.nn.functional as F
import unit_scores
from small_swin import KWARGS, SMALL, SWIN

from torch_dimap import group_units

OPTIONS = argparse.Namespace(device="cpu", amp="none")


@pytest.fixture
def small():
    torch.manual_seed(0)
    return timm.create_model(SWIN, num_classes=2, **SMALL).eval()


@pytest.mark.parametrize("kind", ["heads", "neurons"])
def test_taylor_is_the_change_of_the_loss_with_a_gate(small, kind):
    layers = group_units(small)[kind]
    batch = torch.randn(3, 3, 16, 16), torch.tensor([0, 1, 1])
    found = unit_scores.taylor(layers, small, batch, OPTIONS)
    layer = layers[1]
    gates = torch.ones(3, layer.units, requires_grad=True)

    def gate(_, inputs):
        spread = torch.stack([layer.read.along(g) for g in gates])
        x = inputs[0]
        return x.unflatten(0, (3, -1)).mul(spread.view(3, *[1] * (x.dim() - 1), -1)).flatten(0, 1)

    layer.reader.register_forward_pre_hook(gate)
    F.cross_entropy(small(batch[0]), batch[1]).backward()
    torch.testing.assert_close(found[layer], gates.grad.abs().mean(0))


def test_the_value_path_of_a_head_is_projection_times_value(small):
    layer = group_units(small)["heads"][1]
    attention = layer.module
    found = unit_scores.value_path(layer)
    width = attention.proj.in_features // layer.units
    values = attention.qkv.weight[2 * attention.proj.in_features :].split(width)
    columns = attention.proj.weight.split(width, 1)
    for score, p, v in zip(found, columns, values):
        torch.testing.assert_close(score, (p @ v).norm())


def test_torch_pruning_scores_say_what_its_own_pruner_removes():
    tp = pytest.importorskip("torch_pruning")
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=16, patch_size=8, embed_dim=32,
                              depth=2, num_heads=4, num_classes=2).eval()  # fmt: skip
    images, units = torch.randn(1, 3, 16, 16), group_units(model)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    keep = {
        layer.name: values > values.median()  # the lower half goes
        for kind in units.values()
        for layer, values in unit_scores.torch_pruning(kind, model, (images, None), OPTIONS).items()
    }
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    wide = [(b.attn.qkv.weight.clone(), b.mlp.fc1.weight.clone()) for b in model.blocks]
    for block in model.blocks:
        block.attn.fused_attn = False
    ratios = {layer: 0.5 for b in model.blocks for layer in (b.attn.qkv, b.mlp.fc1)}
    tp.pruner.BasePruner(
        model, images, tp.importance.GroupMagnitudeImportance(), pruning_ratio=0.0,
        pruning_ratio_dict=ratios, num_heads={b.attn.qkv: 4 for b in model.blocks},
        prune_num_heads=True, prune_head_dims=False, head_pruning_ratio=0.5,
    ).step()  # fmt: skip
    for i, (block, (qkv, fc1)) in enumerate(zip(model.blocks, wide)):
        heads = qkv.unflatten(0, (3, 4, -1))[:, keep[f"blocks.{i}.attn"]].flatten(0, 2)
        assert torch.equal(block.attn.qkv.weight, heads)
        assert torch.equal(block.mlp.fc1.weight, fc1[keep[f"blocks.{i}.mlp"]])


def test_compare_units_writes_a_row_for_every_kind_method_and_amount(
    data, tmp_path, monkeypatch, capsys, small
):
    torch.save(small.state_dict(), tmp_path / "0.pth")
    arguments = [SWIN, "--checkpoints", tmp_path / "0.pth", "--model-kwargs", *KWARGS, "--data",
                 data, "--workers", 0, "--device", "cpu", "--batch-size", 8, "--amounts", 0.5,
                 "--output", tmp_path / "out"]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["compare_units.py", *map(str, arguments)])
    compare_units.main()
    with open(tmp_path / "out" / "units_one_shot.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 1 + 2 * len(compare_units.METHODS)
    for row in rows[1:]:
        assert int(row["units_kept"]) == (3 if row["kind"] == "heads" else 96)
    assert "| product | share |" in capsys.readouterr().out


def test_compare_units_measures_with_reconstruction_too(
    data, tmp_path, monkeypatch, capsys, small
):
    torch.save(small.state_dict(), tmp_path / "0.pth")
    arguments = [SWIN, "--checkpoints", tmp_path / "0.pth", "--model-kwargs", *KWARGS, "--data",
                 data, "--workers", 0, "--device", "cpu", "--batch-size", 8, "--amounts", 0.5,
                 "--kinds", "both", "--methods", "product, share", "--reconstruct", 12,
                 "--output", tmp_path]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["compare_units.py", *map(str, arguments)])
    compare_units.main()
    with open(tmp_path / "units_one_shot.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    scores = ["dense", "product", "product, reconstructed on 12 images"]
    assert [row["score"] for row in rows] == scores
    assert [row["units_kept"] for row in rows[1:]] == [str(3 + 96)] * 2
    assert f"| {scores[2]} | share |" in capsys.readouterr().out


def test_refitted_models_differ_and_the_masked_one_stays(small):
    compare_units.mask_units(small, "both", 0.5, None, "share", 1)
    before = {key: value.clone() for key, value in small.state_dict().items()}
    batches = [torch.randn(8, 3, 16, 16)]
    (_, masked), (how, model) = compare_units.refitted(small, {8: batches})
    assert masked is small and how == ", reconstructed on 8 images"
    assert all(torch.equal(value, before[key]) for key, value in small.state_dict().items())
    weights = (x.layers[1].blocks[0].mlp.fc2.weight for x in (small, model))
    assert not torch.equal(*weights)

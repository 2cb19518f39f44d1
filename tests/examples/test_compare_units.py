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
    found = compare_units.taylor(layers, small, batch, OPTIONS)
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
    found = compare_units.value_path(layer)
    width = attention.proj.in_features // layer.units
    values = attention.qkv.weight[2 * attention.proj.in_features :].split(width)
    columns = attention.proj.weight.split(width, 1)
    for score, p, v in zip(found, columns, values):
        torch.testing.assert_close(score, (p @ v).norm())


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

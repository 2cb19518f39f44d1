"""Table 1 of the paper: exact counts of ours, and theirs within a tenth of a point."""

from __future__ import annotations

import pathlib
import runpy
import sys

import pytest
import torch

from torch_dimap.command.table1 import PAPER, table1, table1_cells

EXAMPLE = pathlib.Path(__file__).parents[2] / "examples" / "table1.py"

# Size, amount -> parameters kept, of all; in per cent, what the paper says went of the
# parameters and of the FLOPs; dense FLOPs.
TABLE1 = [
    ("base", 0.15, 75_204_972, 87_768_224, 14.3, 14.4, 15_467_826_176),
    ("base", 0.35, 58_453_972, 87_768_224, 33.4, 33.5, 15_467_826_176),
    ("base", 0.55, 41_702_969, 87_768_224, 52.5, 52.7, 15_467_826_176),
    ("small", 0.15, 42_539_430, 49_606_258, 14.2, 14.3, 8_768_534_784),
    ("small", 0.35, 33_116_990, 49_606_258, 33.2, 33.2, 8_768_534_784),
    ("small", 0.55, 23_694_553, 49_606_258, 52.2, 52.3, 8_768_534_784),
    ("tiny", 0.15, 24_406_574, 28_288_354, 13.7, 13.9, 4_509_194_496),
    ("tiny", 0.35, 19_230_870, 28_288_354, 32.0, 32.4, 4_509_194_496),
    ("tiny", 0.55, 14_055_163, 28_288_354, 50.3, 50.8, 4_509_194_496),
]


@pytest.fixture(scope="module")
def rows():
    before = torch.get_rng_state()
    found = table1()
    assert torch.equal(torch.get_rng_state(), before)
    return {(row.size, row.amount): row for row in found}


@pytest.mark.parametrize("size, amount, kept, parameters, gone, flops_gone, dense", TABLE1)
def test_table1_gives_the_paper_s_nine_models(
    rows, size, amount, kept, parameters, gone, flops_gone, dense
):
    row = rows[size, amount]
    assert (row.kept, row.parameters, row.dense) == (kept, parameters, dense)
    assert PAPER[size][amount] == (pytest.approx(kept / 1e6, abs=0.06), gone, flops_gone)
    assert 100 * (1 - kept / parameters) == pytest.approx(gone, abs=0.1)
    assert 100 * (1 - row.uniform / dense) == pytest.approx(flops_gone, abs=0.1)
    # The mask-weighted count is another number: late layers lose more, and cost less.
    assert row.uniform < row.masked < dense


def test_table1_cells_keep_ours_and_theirs_apart(rows):
    header, *body = table1_cells([rows["tiny", 0.35]])
    assert header == [
        "model",
        "amount",
        "params, ours",
        "paper",
        "params gone, ours",
        "paper",
        "uniform FLOPs gone, ours",
        "paper",
        "masked FLOPs gone, ours",
    ]
    paper = ["Swin-T", "35%", "19.23 M", "19.2 M", "32.02%", "32.0%", "32.30%", "32.4%"]
    assert body[0][:8] == paper


def test_table1_refuses_other_sizes():
    with pytest.raises(ValueError, match=r"among \['base', 'small', 'tiny'\], found 'large'"):
        table1(["large"])


def test_example_prints_the_table(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), "--sizes", "tiny"])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(EXAMPLE), run_name="__main__")
    out = capsys.readouterr().out
    assert caught.value.code == 0 and "ours: counted here, with random weights" in out
    assert [line.split()[:4] for line in out.splitlines()[1:4]] == [
        ["Swin-T", "15%", "24.41", "M"],
        ["Swin-T", "35%", "19.23", "M"],
        ["Swin-T", "55%", "14.06", "M"],
    ]

"""The example that lays accuracy beside measured time."""

from __future__ import annotations

import copy
import csv
import sys

import models
import pytest
import speed
import timm
import torch
from methods import prune_to
from small_swin import KWARGS, SMALL, SWIN

import torch_dimap


@pytest.fixture
def dense():
    torch.manual_seed(0)
    return timm.create_model(SWIN, num_classes=2, **SMALL)


@pytest.fixture
def words(dense, data, tmp_path):
    """Arguments for a dense model, and a fine-tuned one without half of its units."""
    models.save_model(dense, tmp_path / "dense.safetensors")
    tuned = copy.deepcopy(dense)
    prune_to(tuned, "units", 0.5)
    (tmp_path / "units").mkdir()
    models.save_model(torch_dimap.remove_all(tuned), tmp_path / "units" / "model.safetensors")
    with open(tmp_path / "units" / "log.csv", "w") as file:
        file.write("method,amount,seed,epoch\nunits,0.5,3,1\nunits,0.5,3,2\n")
    given = [SWIN, "--model-kwargs", *KWARGS, "--data", data, "--checkpoints",
             tmp_path / "dense.safetensors", "--seeds", 3, "--fine-tuned", tmp_path / "units",
             "--amounts", 0.5, "--workers", 0, "--batch-size", 8, "--device", "cpu",
             "--output", tmp_path / "out"]  # fmt: skip
    return list(map(str, given))


def run(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["speed.py", *words])
    speed.main()


def rows(tmp_path):
    with open(tmp_path / "out" / "speed.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_speed_measures_zeros_and_removed_units(words, dense, tmp_path, monkeypatch, one_thread):
    run(monkeypatch, *words, "--rounds", "0")
    found = {(row["method"], row["epochs"]): row for row in rows(tmp_path)}
    assert list(found) == [("dense", "0"), ("dimap", "0"), ("units", "0"), ("units", "2")]
    parameters = {key: int(row["parameters"]) for key, row in found.items()}
    assert parameters["dense", "0"] == parameters["dimap", "0"]
    assert int(found["dimap", "0"]["nonzero"]) < 0.6 * parameters["dense", "0"]
    prune_to(dense, "units", 0.5)
    slim = torch_dimap.remove_units(dense)
    assert parameters["units", "0"] == sum(p.numel() for p in slim.parameters())
    for key in ("top1", "parameters", "multiply_adds"):  # no training here: the same model
        assert found["units", "0"][key] == found["units", "2"][key]
    assert all(row["milliseconds"] == "" and row["seed"] == "3" for row in found.values())
    assert "| units, removed, 50%, fine-tuned | 1 |" in (tmp_path / "out/speed.md").read_text()

    def again(*_):
        raise AssertionError("a model was tested twice")

    monkeypatch.setattr(speed, "count_correct", again)
    run(monkeypatch, *words, "--rounds", "2", "--time-batch", "2")
    timed = rows(tmp_path)
    assert [row["top1"] for row in timed] == [row["top1"] for row in found.values()]
    assert all(float(row["milliseconds"]) > 0 and row["batch"] == "2" for row in timed)
    assert (tmp_path / "out" / "speed.png").stat().st_size > 5000


def test_speed_refuses_a_folder_without_a_log(words, tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match="nowhere must hold the log.csv of a run of finetune.py"):
        run(monkeypatch, *words, "--fine-tuned", str(tmp_path / "nowhere"))

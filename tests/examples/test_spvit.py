"""The SPViT example: both steps, going on after a stop, controls, and what is refused."""

import csv
import json

import pytest
import spvit
import steps
import timm
import torch
from safetensors.torch import save_file

import torch_dimap

MODEL = ["vit_tiny_patch16_224", "--model-kwargs", "img_size=8", "patch_size=2", "embed_dim=16",
         "depth=2", "num_heads=2", "--data", "digits", "--augmentation", "none", "--workers", "0",
         "--amp", "none", "--data-kwargs", "crop_pct=1.0", "--batch-size", "256", "--device",
         "cpu", "--search-lr", "1e-3", "--gate-lr", "0.2", "--tune-epochs", "2"]  # fmt: skip


def build():
    return timm.create_model("vit_tiny_patch16_224", img_size=8, patch_size=2, embed_dim=16,
                             depth=2, num_heads=2, num_classes=10)  # fmt: skip


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("dense") / "dense.safetensors"
    save_file(build().state_dict(), path)
    return ["--checkpoint", str(path)]


def run(*words):
    torch.set_num_threads(1)
    spvit.main([*MODEL, *map(str, words)])


@pytest.fixture(scope="module")
def done(dense, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "whole"
    run(*dense, "--search-epochs", 10, "--target", 0.6, "--output", folder)
    return folder


def test_both_steps_give_a_model_of_the_target_size(done):
    folder = done
    found = json.loads((folder / "found.json").read_text())
    assert found["share"] == pytest.approx(0.6, abs=0.03)
    model = torch_dimap.load_pruned(build(), folder / "slim.safetensors")
    kept = [block.mlp.fc1.out_features for block in model.blocks]
    assert kept == list(found["neurons"].values())
    with open(folder / "results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["model"] for row in rows] == ["dense", "fine-tuned"]
    assert "| fine-tuned |" in (folder / "report.md").read_text()
    assert (folder / "architecture.png").stat().st_size > 1000


def test_a_stopped_run_goes_on_to_the_same_bytes(done, dense, tmp_path, monkeypatch):
    whole, save, saved = done, torch.save, []

    def stop_at_times(*args):
        save(*args)
        saved.append(args)
        if len(saved) in (3, 11):  # in the search, and in the tuning
            raise KeyboardInterrupt

    monkeypatch.setattr(steps.torch, "save", stop_at_times)
    options = [*dense, "--search-epochs", 10, "--target", 0.6, "--output", tmp_path / "again"]
    for more in ([], ["--resume"]):
        with pytest.raises(SystemExit):
            run(*options, *more)
    run(*options, "--resume")
    for name in ("found.json", "slim.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (whole / name).read_bytes()


def copied(done, tmp_path):
    folder = tmp_path / "other"
    folder.mkdir()
    for name in ("search.pth", "found.json"):
        (folder / name).write_bytes((done / name).read_bytes())
    return ["--search-epochs", 10, "--target", 0.6, "--output", folder, "--step", "tune"]


def test_tuning_can_start_from_the_weights_of_the_search(done, dense, tmp_path):
    run(*dense, *copied(done, tmp_path), "--start", "search", "--skip", "norm")
    assert torch_dimap.load_pruned(build(), tmp_path / "other" / "slim.safetensors")


def test_a_teacher_changes_what_is_learned(done, dense, tmp_path):
    run(*dense, *copied(done, tmp_path), "--control", "neurons", "--teacher", *MODEL[:1],
        "--teacher-checkpoint", dense[1], "--teacher-kwargs", *MODEL[2:7])  # fmt: skip
    with open(tmp_path / "other" / "log.csv", newline="") as file:
        taught = [row["loss"] for row in csv.DictReader(file) if row["step"] == "tune"]
    with open(done / "log.csv", newline="") as file:
        alone = [row["loss"] for row in csv.DictReader(file) if row["step"] == "tune"]
    assert len(taught) == len(alone) == 2 and taught != alone


def test_given_operations_need_no_search(dense, tmp_path):
    run(*dense, "--operations", "conv3", "skip", "--control", "weights", "--output",
        tmp_path / "given")  # fmt: skip
    model = torch_dimap.load_pruned(build(), tmp_path / "given" / "slim.safetensors")
    made = torch_dimap.learning.replaced_attentions(model)
    assert [x.operation for x in made.values()] == ["conv3", "skip"]


@pytest.mark.parametrize("more, error", [
    (["--target", "1.5"], "--target must lie between 0 and 1"),
    (["--target", "0.01"], "target must be at least 0."),
    (["--step", "tune"], "run --step search first"),
    (["--operations", "skip"], "--operations must name 2 blocks, found 1"),
    (["--operations", "skip", "skip", "--start", "search"], "leaves the search out"),
])  # fmt: skip
def test_wrong_options_end_in_one_line(dense, tmp_path, more, error, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(*dense, "--output", tmp_path / "wrong", *more)
    assert error in f"{stopped.value.code}{capsys.readouterr().err}".splitlines()[-1]

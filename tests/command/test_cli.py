"""The command line: what it prints, and how it fails."""

from __future__ import annotations

import csv
import json
import subprocess
import sys

import pytest
import safetensors.torch
import timm
import torch

from torch_dimap import (
    global_module_aware_unstructured,
    group_parameters,
    remove_all,
    summarize,
)
from torch_dimap.command.parser import COMMANDS, main
from torch_dimap.command.table1 import Table1Row

NAME = "swin_tiny_patch4_window7_224"


@pytest.fixture(scope="module")
def pruned():
    """A pruned model, the densities of its layers, and its state dicts, masked and baked."""
    model = timm.create_model(NAME, num_classes=10)
    global_module_aware_unstructured(group_parameters(model), amount=0.5)
    masked = {key: value.clone() for key, value in model.state_dict().items()}
    summary = summarize(remove_all(model))
    return summary, masked, model.state_dict()


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    code = main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return code, out, err


def test_summarize_takes_the_name_of_a_model(capsys):
    code, out, _ = run(capsys, "summarize", NAME, "--format", "json")
    data = json.loads(out)
    assert code == 0 and data["model"]["dense_flops"] == 4_509_194_496
    assert [group["name"] for group in data["groups"]] == ["qkv", "proj", "mlp"]


def test_summarize_counts_flops_for_another_size(capsys):
    _, out, _ = run(capsys, "summarize", NAME, "--img-size", "112", "--num-classes", "10")
    assert "inputs of 1x3x112x112" in out


@pytest.mark.parametrize("kind", ["masked.pt", "baked.pt", "wrapped.pth", "baked.safetensors"])
def test_summarize_takes_a_file(capsys, tmp_path, pruned, kind):
    summary, masked, baked = pruned
    path = tmp_path / kind
    if kind == "baked.safetensors":
        safetensors.torch.save_file(baked, path)
    else:
        states = {"masked.pt": masked, "baked.pt": baked, "wrapped.pth": {"state_dict": baked}}
        torch.save(states[kind], path)
    code, out, _ = run(capsys, "summarize", path, "--format", "json")
    assert code == 0 and json.loads(out) == json.loads(json.dumps(summary.to_dict()))


def test_summarize_of_a_file_counts_flops_when_told_the_model(capsys, tmp_path, pruned):
    summary, _, baked = pruned
    torch.save(baked, tmp_path / "baked.pt")
    code, out, _ = run(
        capsys,
        *("summarize", tmp_path / "baked.pt", "--model", NAME),
        *("--num-classes", 10, "--format", "csv"),
    )
    rows = list(csv.DictReader(out.splitlines()))
    assert code == 0 and int(rows[-1]["zeros"]) == summary.model.zeros
    assert int(rows[-1]["masked_flops"]) < int(rows[-1]["dense_flops"])


def test_summarize_can_leave_flops_out(capsys):
    _, out, _ = run(capsys, "summarize", NAME, "--no-flops", "--format", "markdown")
    assert out.startswith("| layer | group | shape |") and "FLOPs" not in out


@pytest.mark.parametrize(
    "option", [("--img-size", 112), ("--num-classes", 10), ("--no-flops",)], ids=lambda x: x[0]
)
def test_summarize_of_a_file_wants_a_model_for_options_about_it(capsys, tmp_path, pruned, option):
    torch.save(pruned[2], tmp_path / "baked.pt")
    code, _, err = run(capsys, "summarize", tmp_path / "baked.pt", *option)
    assert code == 1 and f"{option[0]} goes with a model: add --model NAME" in err


def test_prune_expand_and_inspect_a_file(capsys, tmp_path, pruned):
    dense, packed, whole = (tmp_path / f"{name}.safetensors" for name in ("d", "packed", "whole"))
    torch.manual_seed(0)
    model = timm.create_model(NAME)
    safetensors.torch.save_file(model.state_dict(), dense)
    code, out, err = run(capsys, "prune", dense, packed, "--amount", "0.25", "--compressed")
    assert (code, err) == (0, "") and out.startswith(f"{packed}: {packed.stat().st_size:,} bytes;")
    assert run(capsys, "expand", packed, whole)[0] == 0
    global_module_aware_unstructured(group_parameters(model), amount=0.25)
    expected = remove_all(model).state_dict()
    found = safetensors.torch.load_file(whole)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    tables = [run(capsys, "inspect", path)[1] for path in (packed, whole, dense)]
    assert "masks and the values that they keep, written by torch_dimap" in tables[0]
    rows = [[line.split() for line in table.splitlines()[1:5]] for table in tables]
    assert rows[0] == rows[1] and rows[0][1][:5] == "qkv 12 6,469,632 4,852,224 0.7500".split()
    assert rows[2][3][:3] == "mlp 24 17,252,352".split() and rows[2][3][4] == "1.0000"
    code, out, _ = run(capsys, "summarize", packed, "--format", "json")
    assert code == 0 and json.loads(out)["prunable"]["density"] == 0.75


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["prune", "{}/d.pt", "{}/d.pt", "--amount", "0.5", "--force"], "another file than the s"),
        (["prune", "{}/d.pt", "{}/old", "--amount", "0.5"], "old exists: name another target"),
        (["prune", "{}/d.pt", "{}/no/out", "--amount", "0.5"], "there is no folder"),
        (["prune", "{}/d.pt", "{}/out", "--amount", "2.5"], "must lie in [0, 1], found 2.5"),
        (["prune", "{}/nothing", "{}/out", "--amount", "1"], "nothing: No such file or directory"),
        (["expand", "{}/d.pt", "{}/out"], "must have masks to be expanded"),
        (["inspect", "{}/old"], "must be a checkpoint"),
    ],
)
def test_file_commands_fail_on_one_line(capsys, tmp_path, pruned, arguments, message):
    torch.save(pruned[2], tmp_path / "d.pt")
    (tmp_path / "old").write_text("old")
    code, out, err = run(capsys, *(argument.format(tmp_path) for argument in arguments))
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert err.startswith(f"torch-dimap {arguments[0]}: error: ") and message in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d.pt", "old"]


def test_table1_prints_markdown(capsys, monkeypatch):
    flops = 4_509_194_496, 3_900_000_000, 3_880_000_000
    row = Table1Row("tiny", 0.15, 28_288_354, 24_406_574, *flops)
    monkeypatch.setattr("torch_dimap.command.parser.table1", lambda sizes, pretrained: [row])
    code, out, _ = run(capsys, "table1", "--sizes", "tiny", "--markdown")
    assert code == 0 and out.splitlines()[2].startswith("| Swin-T | 15% | 24.41 M | 24.4 M |")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["swin_tiny_patch4"], "found neither: did you mean swin_tiny_patch4_window7_224"),
        (["resnet18"], "no layer of ResNet is named like"),
        ([NAME, "--model", NAME], "--model and a file go together"),
    ],
)
def test_summarize_fails_on_one_line(capsys, arguments, message):
    code, out, err = run(capsys, "summarize", *arguments)
    assert (code, out) == (1, "")
    assert err.startswith("torch-dimap summarize: error: ") and message in err
    assert err.count("\n") == 1


def test_summarize_says_what_is_wrong_with_a_file(capsys, tmp_path, pruned):
    path = tmp_path / "notes.pt"
    path.write_text("not weights")
    assert "must be a checkpoint" in run(capsys, "summarize", path)[2]
    torch.save({"epoch": 3}, path)
    assert "found no tensor in it" in run(capsys, "summarize", path)[2]
    torch.save(pruned[2], path)
    code, _, err = run(capsys, "summarize", path, "--model", NAME)
    assert code == 1 and "head.fc.weight, head.fc.bias missing or of another shape" in err
    assert "file go together" in run(capsys, "summarize", path, "--pretrained")[2]


def test_pretrained_weights_that_cannot_be_had_are_an_error_on_one_line(capsys, monkeypatch):
    def offline(*_, **__):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(timm, "create_model", offline)
    code, _, err = run(capsys, "table1", "--pretrained", "--sizes", "tiny")
    assert code == 1 and err.count("\n") == 1
    assert "weights of swin_tiny_patch4_window7_224.ms_in1k cannot be had (no route)" in err


@pytest.mark.parametrize("arguments", [[], ["prune-all"], ["summarize"], ["table1", "--sizes"]])
def test_arguments_that_make_no_sense_exit_with_2(capsys, arguments):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2 and "usage: torch-dimap" in capsys.readouterr().err


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(capsys, command):
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    assert caught.value.code == 0 and COMMANDS[command].help in capsys.readouterr().out


def test_the_module_runs():
    command = [sys.executable, "-m", "torch_dimap", "--version"]
    assert subprocess.run(command, capture_output=True, text=True).stdout == "torch_dimap 0.1.0\n"

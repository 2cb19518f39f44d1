"""The examples and benchmarks, run as a user runs them, in small."""

from __future__ import annotations

import csv
import importlib
import os
import sys

import pytest
import quickstart
import timm
import torch
from safetensors.torch import load_file
from scripts import ROOT, run

from torch_dimap import load_pruned

SWIN, VIT = "swin_tiny_patch4_window7_224", "vit_tiny_patch16_224"


def test_quickstart_prints_a_table_and_keeps_files(tmp_path, capsys, monkeypatch, one_thread):
    load = quickstart.load_data
    monkeypatch.setattr(quickstart, "load_data", lambda: [part[:300] for part in load()])
    monkeypatch.setattr(quickstart, "UNLABELLED", 32)
    monkeypatch.setattr(sys, "argv", [
        "quickstart.py", "--epochs", "1", "--finetune-epochs", "1", "--amounts", "0.5",
        "--output", str(tmp_path),
    ])  # fmt: skip
    quickstart.main()
    first, *rest = capsys.readouterr().out.splitlines()
    assert first.startswith("40 training steps: about ")  # 10 x (1 + 3)
    lines = [line for line in rest if line.strip().startswith("50%")]
    assert [line.split()[1] for line in lines] == ["DIMAP", "uniform", "units"]
    computed = [float(line.split()[-1]) for line in lines]
    assert computed[:2] == [100, 100] and 40 < computed[2] < 70
    state = load_file(tmp_path / "swin_digits_dimap_0.50_seed0.safetensors")
    prunable = [value for key, value in state.items() if "mlp.fc" in key and value.dim() == 2]
    zeros = sum(int((value == 0).sum()) for value in prunable)
    assert zeros == round(0.5 * sum(value.numel() for value in prunable))
    slim = load_pruned(tmp_path / "swin_digits_units_removed_0.50_seed0.safetensors")
    assert sum(map(torch.numel, slim.values())) < 0.6 * sum(map(torch.numel, state.values()))


def test_prune_timm_writes_a_baked_model(tmp_path):
    checkpoint, output = tmp_path / "dense.pth", tmp_path / "baked.safetensors"
    torch.manual_seed(0)
    torch.save(timm.create_model(SWIN).state_dict(), checkpoint)
    done = run("examples/prune_timm.py", SWIN, "--amount", 0.15, "--checkpoint", checkpoint,
               "--output", output)  # fmt: skip
    assert done.returncode == 0, done.stderr
    model = timm.create_model(SWIN)
    model.load_state_dict(load_file(output))
    assert sum(int((p == 0).sum()) for p in model.parameters()) >= round(0.15 * 25_878_528)
    assert os.listdir(tmp_path).count("baked.safetensors") == 1 and len(os.listdir(tmp_path)) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([SWIN, "--amount", 0.5, "--pretrained"], "no weights for swin_tiny"),
        ([SWIN, "--amount", 0.5, "--checkpoint", "nowhere.pth"], "there is no file nowhere.pth"),
        ([SWIN, "--amount", 1.5, "--random-init"], "--amount must lie between 0 and 1"),
        (["swin_huge", "--amount", 0.5, "--random-init"], "timm knows no model 'swin_huge'"),
        (["resnet18", "--amount", 0.5, "--random-init"], "group_parameters"),
        ([SWIN, "--amount", 0.5], "one of the arguments"),
    ],
)
def test_prune_timm_says_in_words_what_is_wrong(arguments, message):
    done = run("examples/prune_timm.py", *arguments)
    assert done.returncode != 0
    assert message in done.stderr and "Traceback" not in done.stderr


def test_prune_timm_refits_what_is_kept(data, tmp_path):
    done = run("examples/prune_timm.py", "test_vit", "--amount", 0.5, "--random-init",
               "--images", data, "--reconstruct", 3)  # fmt: skip
    assert done.returncode == 0, done.stderr
    line = next(x for x in done.stdout.splitlines() if x.startswith("Reconstructed on 3 images"))
    before, after = (float(word.strip("%")) for word in line.split() if word.endswith("%"))
    assert after < before


@pytest.fixture
def benchmark(monkeypatch):
    """Load a benchmark by its name, and give it the words of a command line."""

    def load(name, *words):
        monkeypatch.syspath_prepend(ROOT / "benchmarks")
        monkeypatch.setattr(sys, "argv", [name, *map(str, words)])
        return importlib.import_module(name)

    return load


def test_benchmarks_measure_in_fresh_processes(tmp_path, benchmark):
    found = benchmark("prune").measure_in_fresh_process("16000", "torch_dimap", "cpu", 0)
    assert found["prunable"] == 16000 and found["seconds"] > 0
    assert benchmark("files").in_fresh_process("make", tmp_path / "file.pth", 0.05, 0) == []
    assert (tmp_path / "file.pth").is_file()


@pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK), reason="peak memory is read from Linux's /proc"
)
def test_benchmark_of_pruning_writes_table_and_plot(tmp_path, benchmark, monkeypatch):
    prune = benchmark(
        "prune", "--models", VIT, "--methods", "identity", "torch_dimap", "--scaling", 1e5,
        "--ties", "half-equal", "--repeats", 1, "--output", tmp_path,
    )  # fmt: skip
    monkeypatch.setattr(prune, "measure_in_fresh_process", prune.measure)
    prune.main()
    assert sorted(os.listdir(tmp_path)) == ["prune.csv", "prune.md", "prune.png"]
    rows = list(csv.DictReader(open(tmp_path / "prune.csv")))
    assert [(row["model"], row["method"]) for row in rows] == [
        (model, method)
        for model in (VIT, "100000", "half-equal")
        for method in ("identity", "torch_dimap")
    ]
    assert all(float(row["seconds"]) > 0 for row in rows)


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="peak memory is read in /proc")
def test_benchmark_of_files_writes_tables(tmp_path, benchmark, monkeypatch):
    files = benchmark(
        "files", "--model", VIT, "--gigabytes", 0.05, "--formats", "pth", "--repeats", 1,
        "--folder", tmp_path, "--output", tmp_path,
    )  # fmt: skip
    monkeypatch.setattr(files, "in_fresh_process", lambda *job: files.run_one(list(map(str, job))))
    files.main()
    assert sorted(os.listdir(tmp_path)) == ["files.csv", "files.md"]
    rows = {row["kind"]: row for row in csv.DictReader(open(tmp_path / "files.csv"))}
    whole, packed = int(rows["save_file"]["bytes"]), int(rows["save_pruned"]["bytes"])
    assert packed < 0.6 * whole and int(rows["prune_checkpoint"]["peak_bytes"]) > 0


def test_benchmark_of_forwards_writes_pieces_into_one_table(tmp_path):
    words = ["benchmarks/latency.py", "--models", VIT, "--rounds", 2, "--output", tmp_path]
    run(*words, "--batch-sizes", 1, "--methods", "dense", "slim")
    done = run(*words, "--runtimes", "pruning")
    assert f"| {VIT} | 1 | eager | slim | " in done.stdout
    assert f"| {VIT} |  | pruning | slim, global | " in done.stdout
    assert len((tmp_path / "latency.csv").read_text().splitlines()) == 1 + 4 + 2


def test_benchmark_of_sparse_products_prints_a_table():
    done = run("benchmarks/sparse_products.py", "--sparsity", 0.95, "--repeats", 2)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("| 95% | 1 | ")


def test_benchmark_of_a_search_prints_a_table():
    done = run("benchmarks/single_path.py", "--models", "vit_tiny_patch16_224", "--batch", 1,
               "--rounds", 1)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "| vit_tiny_patch16_224 | " in done.stdout

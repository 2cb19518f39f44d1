"""Pruning methods by name, and the example that compares them."""

from __future__ import annotations

import csv
import os
import sys

import compare
import methods
import pytest
import timm
import torch
import torch.nn.functional as F
from small_swin import KWARGS, PRUNABLE, SMALL, SWIN
from torch.nn.utils import prune

import torch_dimap


@pytest.fixture
def small():
    torch.manual_seed(0)
    return timm.create_model(SWIN, num_classes=2, **{**SMALL, "depths": (1, 2)})


@pytest.mark.parametrize(
    ("grouping", "keys"),
    [
        ("module", ["qkv", "proj", "mlp"]),
        ("single", ["all"]),
        ("type", ["qkv", "proj", "fc1", "fc2"]),
        ("stage", ["layers.0.blocks", "layers.1.blocks"]),
        ("block", ["layers.0.blocks.0", "layers.1.blocks.0", "layers.1.blocks.1"]),
    ],
)
def test_regroup_names_the_groups(small, grouping, keys):
    groups = methods.regroup(small, grouping)
    assert sorted(groups) == sorted(keys)
    assert sum(map(len, groups.values())) == 12


def test_regroup_by_layer_gives_each_its_own_group(small):
    groups = methods.regroup(small, "layer")
    assert len(groups) == 12 and all(len(pairs) == 1 for pairs in groups.values())
    assert "layers.1.blocks.0.attn.qkv" in groups


def kept(model):
    return {name: b.bool() for name, b in model.named_buffers() if name.endswith("weight_mask")}


def test_prune_to_uniform_is_l1_of_every_layer(small):
    reference = timm.create_model(SWIN, num_classes=2, **{**SMALL, "depths": (1, 2)})
    reference.load_state_dict(small.state_dict())
    for pairs in torch_dimap.group_parameters(reference).values():
        for module, name in pairs:
            prune.l1_unstructured(module, name, amount=0.4)
    methods.prune_to(small, "uniform", 0.4)
    torch.testing.assert_close(kept(small), kept(reference))


def test_prune_to_global_is_torchs_global_l1(small):
    pairs = [pair for group in torch_dimap.group_parameters(small).values() for pair in group]
    weights = torch.cat([getattr(*pair).detach().flatten().abs() for pair in pairs])
    methods.prune_to(small, "global", 0.4)
    masks = torch.cat([getattr(m, f"{n}_mask").flatten() for m, n in pairs])
    assert weights[~masks].max() <= weights[masks].min()
    assert int((~masks).sum()) == round(0.4 * len(weights))


@pytest.mark.parametrize("method", [m for m in methods.METHODS if m not in methods.SCORED])
def test_prune_to_counts_what_went_before(small, method):
    counts = []
    for share in (0.3, 0.6, 0.7):
        before = kept(small)
        methods.prune_to(small, method, share)
        now = kept(small)
        assert all(not (now[name] & ~mask).any() for name, mask in before.items())
        counts.append(sum(int((~mask).sum()) for mask in now.values()))
    totals = [sum(getattr(*pair).numel() for pair in pairs)
              for pairs in methods.regroup(small, methods.METHODS[method][0]).values()]  # fmt: skip
    assert counts[-1] == sum(round(0.7 * total) for total in totals)


def test_gradient_scores_are_weight_times_gradient_of_the_mean_loss(small):
    generator = torch.Generator().manual_seed(0)
    batches = [(torch.randn(4, 3, 16, 16, generator=generator), torch.tensor([0, 1, 0, 1]))
               for _ in range(3)]  # fmt: skip
    options = compare.argparse.Namespace(gradient_batches=2, device="cpu", amp="none")
    scores = compare.gradient_scores(small, batches, options)
    images, labels = (torch.cat(part) for part in zip(*batches[:2]))
    small.zero_grad()
    F.cross_entropy(small(images), labels).backward()
    assert len(scores) == 12
    for (module, name), score in scores.items():
        weight = getattr(module, name)
        assert not score.requires_grad
        torch.testing.assert_close(2 * (weight * weight.grad).abs(), score)  # a sum of two batches


@pytest.fixture
def run(monkeypatch, one_thread):
    def run(*words):
        monkeypatch.setattr(sys, "argv", ["compare.py", *map(str, words)])
        compare.main()

    return run


def test_compare_writes_a_row_for_every_seed_method_and_amount(data, tmp_path, run, capsys):
    files = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        files.append(tmp_path / f"{seed}.pth")
        torch.save(timm.create_model(SWIN, num_classes=2, **SMALL).state_dict(), files[-1])
    run(SWIN, "--checkpoints", *files, "--model-kwargs", *KWARGS, "--data", data, "--workers", 0,
        "--device", "cpu", "--batch-size", 8, "--amounts", 0.5, 0.9, "--gradient-batches", 2,
        "--output", tmp_path / "out")  # fmt: skip
    assert sorted(os.listdir(tmp_path / "out")) == ["one_shot.csv", "one_shot.md", "one_shot.png"]
    with open(tmp_path / "out" / "one_shot.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * (1 + 2 * len(methods.METHODS))
    size = sum(p.numel() for p in timm.create_model(SWIN, num_classes=2, **SMALL).parameters())
    for row in rows:
        share = float(row["amount"]) * PRUNABLE / size
        assert float(row["parameters_removed"]) == pytest.approx(share, abs=1e-4)
        assert 0 <= float(row["top1"]) <= 100 and row["command"].startswith("python compare.py")
    table = (tmp_path / "out" / "one_shot.md").read_text()
    assert table.strip() in capsys.readouterr().out
    lines = [line.split(" | ") for line in table.splitlines() if "–" in line]
    assert [line[0] for line in lines[1:]] == [f"| {method}" for method in methods.METHODS]


def test_compare_says_what_a_refit_gains_and_loses(data, tmp_path, run):
    torch.manual_seed(0)
    torch.save(timm.create_model(SWIN, num_classes=2, **SMALL).state_dict(), tmp_path / "0.pth")
    run(SWIN, "--checkpoints", tmp_path / "0.pth", "--model-kwargs", *KWARGS, "--data", data,
        "--workers", 0, "--device", "cpu", "--batch-size", 8, "--methods", "dimap", "--amounts",
        0.9, "--reconstruct", 8, "--damping", 0.01, 0.1, "--ways", "order", "--output",
        tmp_path / "out")  # fmt: skip
    with open(tmp_path / "out" / "one_shot.csv", newline="") as file:
        dense, one_shot, *refitted = csv.DictReader(file)
    assert [row["method"] for row in refitted] == [
        f"dimap, in order, 8 images, damping {damping:g}" for damping in (0.01, 0.1)
    ]
    images = sum(len(files) for _, _, files in os.walk(data / "validation"))
    for row in refitted:
        change = int(row["gained"]) - int(row["lost"])
        assert 100 * change / images == pytest.approx(float(row["top1"]) - float(one_shot["top1"]))
    assert not one_shot["gained"]
    assert (float(dense["agreement"]), float(dense["divergence"])) == (100, 0)
    for row in refitted:  # on the very kind of images, the outputs come nearer to the dense ones
        assert 0 < float(row["divergence"]) < float(one_shot["divergence"])


def test_compare_refuses_a_damping_of_nothing(run, capsys):
    with pytest.raises(SystemExit):
        run(SWIN, "--pretrained", "--data", "nowhere", "--damping", 0)
    assert "--damping must be above 0, found [0.0]" in capsys.readouterr().err

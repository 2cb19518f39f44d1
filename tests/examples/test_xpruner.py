"""The X-Pruner-style example: three steps, in one run, singly, or after a stop."""

from __future__ import annotations

import csv
import os
import sys

import compare_xpruner
import faithfulness
import pytest
import scripts
import steps
import timm
import torch
import torch.distributed as dist
import xpruner
import xpruner_figures
from conftest import make_swin, make_vit
from safetensors.torch import load_file
from small_swin import KWARGS, SMALL, SWIN
from timm.models.swin_transformer import window_partition

import torch_dimap
from torch_dimap.learning import ClassMasks

RECIPE = ["--mask-epochs", 2, "--rate-epochs", 3, "--tune-epochs", 1, "--batch-size", 8,
          "--workers", 0, "--device", "cpu", "--amp", "none", "--augmentation", "none",
          "--threshold-lr", 0.3]  # fmt: skip
PRODUCTS = ["masks.safetensors", "pruned.safetensors", "slim.safetensors"]


def any_options():
    return xpruner.parse("any --random-init --data any --output any --device cpu".split()
                         + ["--amp", "none"])  # fmt: skip


def words(data, output, *more):
    start = [] if "--checkpoint" in more else ["--random-init"]
    own = [SWIN, *start, "--model-kwargs", *KWARGS, "--data", data, "--output", output]
    return [str(word) for word in (*own, *RECIPE, *more)]


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """A run of all three steps."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    output = tmp_path_factory.mktemp("xpruner") / "whole"
    xpruner.main(words(data, output))
    torch.set_num_threads(threads)
    return output


def contents(output):
    return {name: (output / name).read_bytes() for name in PRODUCTS}


def same(output, whole):
    """Whether the files hold the same tensors; their headers may name a folder."""
    return contents(output) == contents(whole)


def rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_xpruner_writes_models_table_and_pictures(whole):
    assert {*PRODUCTS, "log.csv", "results.csv", "report.md", "deletion.csv", "class_masks.png",
            "one_class.png", "one_image.png"} <= set(os.listdir(whole))  # fmt: skip
    results = {row["model"]: row for row in rows(whole / "results.csv")}
    model = timm.create_model(SWIN, num_classes=2, **SMALL)
    slim = torch_dimap.load_pruned(model, whole / "slim.safetensors")
    counted = torch_dimap.count_flops(slim, torch.zeros(1, 3, 16, 16)).dense / 1e6
    assert float(results["fine-tuned"]["multiply-adds, M"]) == counted
    assert counted < float(results["dense"]["multiply-adds, M"])
    log = rows(whole / "log.csv")
    assert [row["step"] for row in log] == ["masks"] * 2 + ["rates"] * 3 + ["tune"]
    assert all(row["top1"] == "nan" for row in log[:2]), "masked by labels, there is no accuracy"
    report = (whole / "report.md").read_text()
    assert "fed a random label, follows it" in report and "more than for others" in report


def test_steps_run_singly_to_the_same_files(data, whole, tmp_path, one_thread):
    with pytest.raises(SystemExit, match="masks.safetensors: run --step masks first"):
        xpruner.main(words(data, tmp_path / "out", "--step", "rates"))
    for step in ("masks", "rates", "tune"):
        xpruner.main(words(data, tmp_path / "out", "--step", step, "--probe-images", 0))
    assert same(tmp_path / "out", whole)
    with pytest.raises(SystemExit, match="holds the step tune already"):
        xpruner.main(words(data, tmp_path / "out", "--step", "tune"))
    with pytest.raises(SystemExit, match="other values of --mask-lr"):
        xpruner.main(words(data, tmp_path / "out", "--step", "rates", "--mask-lr", 1))


@pytest.mark.parametrize("stop", [1, 3])
def test_a_stopped_step_resumes_to_the_same_bytes(
    data, whole, tmp_path, one_thread, monkeypatch, stop
):
    """Stopped in the second epoch of the first step, and in that of the second."""
    done = 0
    epoch = steps.run_epoch

    def stop_there(*arguments):
        nonlocal done
        if done == stop:
            raise KeyboardInterrupt
        done += 1
        return epoch(*arguments)

    plain = words(data, tmp_path / "out", "--probe-images", 0)
    with monkeypatch.context() as patch:
        patch.setattr(steps, "run_epoch", stop_there)
        with pytest.raises(SystemExit) as stopped:
            xpruner.main(plain)
    assert stopped.value.code == 130
    with pytest.raises(SystemExit, match="is not an empty folder"):
        xpruner.main(plain)
    xpruner.main([*plain, "--resume"])
    assert same(tmp_path / "out", whole)


@pytest.mark.parametrize("rates", ["layer", "kind"])
def test_simpler_rates_take_no_training(data, tmp_path, one_thread, rates):
    xpruner.main(words(data, tmp_path, "--step", "rates", "--rates", rates, "--scores", "dimap",
                       "--probe-images", 0))  # fmt: skip
    assert [row["model"] for row in rows(tmp_path / "results.csv")] == ["dense", "pruned"]
    model = timm.create_model(SWIN, num_classes=2, **SMALL)
    before = torch_dimap.count_flops(model, torch.zeros(1, 3, 16, 16)).dense
    slim = torch_dimap.load_pruned(model, tmp_path / "pruned.safetensors")
    after = torch_dimap.count_flops(slim, torch.zeros(1, 3, 16, 16)).dense
    assert 0.59 < after / before <= 0.6


def test_digits_need_no_download(tmp_path, one_thread):
    small = ["--model-kwargs", "img_size=8", "patch_size=4", "embed_dim=16", "depth=1",
             "num_heads=2"]  # fmt: skip
    xpruner.main([str(w) for w in (
        "vit_tiny_patch16_224", "--random-init", *small, "--data", "digits", "--data-kwargs",
        "crop_pct=1.0", "--output", tmp_path, *RECIPE, "--batch-size", 128, "--mask-epochs", 1,
        "--rate-epochs", 1, "--classes", 3, 7, "--probe-images", 0,
    )])  # fmt: skip
    assert rows(tmp_path / "results.csv")[0]["model"] == "dense"
    masks = load_file(tmp_path / "masks.safetensors")
    assert {len(mask) for mask in masks.values()} == {10}


def test_comparison_cuts_all_arms_to_one_cost(data, whole, tmp_path, monkeypatch, one_thread):
    timm_model = timm.create_model(SWIN, num_classes=2, **SMALL)
    torch.save(timm_model.state_dict(), tmp_path / "dense.pth")
    own = [SWIN, "--model-kwargs", *KWARGS, "--data", data, *RECIPE, "--random-init"]
    own.remove("--random-init")
    line = ["compare_xpruner.py", "--checkpoints", tmp_path / "dense.pth", "--output",
            tmp_path / "runs", "--results", tmp_path / "results", "--few", 1, "--arms",
            "masks,learned", "taylor,layer", "random,kind", "--tuned", "masks,learned",
            "--few-arms", "all_masks,layer", "--few-target", 0.7, "--", *own]  # fmt: skip
    monkeypatch.setattr(sys, "argv", list(map(str, line)))
    compare_xpruner.main()
    found = rows(tmp_path / "results" / "xpruner.csv")
    shares = [float(row["share"]) for row in found]
    assert len(shares) == 4 and max(shares[:3]) - min(shares[:3]) < 0.01 and shares[3] <= 0.7
    assert [row["fine_tuned"] != "" for row in found] == [True, False, False, True]
    assert (tmp_path / "results" / "xpruner.md").read_text().count("±") > 10


@pytest.mark.skipif(not dist.is_available(), reason="torch was built without torch.distributed")
def test_two_processes_learn_what_one_does(data, tmp_path, one_thread):
    xpruner.main(words(data, tmp_path / "one", "--probe-images", 0))
    both = words(data, tmp_path / "two", "--batch-size", 4, "--probe-images", 0)
    done = scripts.run("examples/xpruner.py", *both, processes=2)
    assert done.returncode == 0, done.stderr
    one, two = (rows(tmp_path / name / "log.csv") for name in ("one", "two"))
    for alone, both in zip(one, two, strict=True):  # the same images in every step
        assert float(alone["loss"]) == pytest.approx(float(both["loss"]), rel=1e-4)
    assert all((tmp_path / "two" / name).is_file() for name in PRODUCTS)


def test_leakage_counts_what_follows_the_labels(images):
    """Masks that hide all but one class's path are followed always."""
    model = make_vit().eval()
    options = any_options()

    class Echo(torch.nn.Module):
        """Says what label the masks were given."""

        def forward(self, x):
            return torch.nn.functional.one_hot(masks._labels, 10).float()

    loader = [(images, torch.tensor([1, 2, 3, 4]))]
    with ClassMasks(model, torch_dimap.group_units(model), 10) as masks:
        found = faithfulness.leakage(Echo(), masks, loader, options)
    assert list(found.values()) == [100.0, 100.0, 10.0]


def test_most_important_units_are_those_of_the_whole_model(swin):
    units = torch_dimap.group_units(swin)
    layers = [layer for members in units.values() for layer in members]
    scores = {layer: torch.rand(layer.units) for layer in layers}
    chosen = faithfulness.most_important(scores, 0.25)
    for members in units.values():
        flags = torch.cat([chosen[x] for x in members])
        values = torch.cat([scores[x] for x in members])
        assert flags.sum() == round(0.25 * len(flags))
        assert values[flags].min() > values[~flags].max()


def test_deletion_finds_the_units_that_carry_a_class():
    """Toy masks that name, for each class, a unit of its own."""
    model = make_vit().eval()
    layer = torch_dimap.group_units(model)["neurons"][0]
    options = any_options()

    class Toy(torch.nn.Module):
        """Knows a class as long as the neuron of its number is there."""

        def forward(self, labels):
            alive = layer.reader._forward_pre_hooks
            x = torch.ones(1, 1, layer.units)
            for hook in alive.values():
                x = hook(layer.reader, (x,))[0]
            own = x[0, 0, labels] > 0
            return torch.nn.functional.one_hot(torch.where(own, labels, (labels + 1) % 10), 10)

    labels = torch.arange(10)
    with ClassMasks(model, [layer], 10, initial=0.0) as masks:
        masks.masks[0].data[labels, labels] = 1.0
    for share in (1 / layer.units,):
        table = faithfulness.accuracy_by_class(
            Toy(), faithfulness.most_important(masks.scores([3]), share), [(labels, labels)],
            options, 10,
        )  # fmt: skip
        assert table.tolist() == [100, 100, 100, 0, 100, 100, 100, 100, 100, 100]
    found = faithfulness.summarize_deletion(
        faithfulness.deletion(Toy(), masks, [(labels, labels)], options)
    )
    own = next(row for row in found if row["order"] == "for the class")
    assert own["own"].mean == 100 and own["others"].mean < 100


@pytest.mark.parametrize("make", [make_vit, make_swin])
def test_attention_maps_add_up_to_what_the_queries_give(make, images):
    model = make().eval()
    before = [getattr(module, "fused_attn", None) for module in model.modules()]
    for layer in torch_dimap.group_units(model)["heads"]:
        found = xpruner_figures.attention_map(model, layer, images[0])
        assert found.shape == (layer.units, *[4 if make is make_vit else found.shape[1]] * 2)
        if make is make_swin:  # every query of a window gives 1 in all, over its 16 keys
            torch.testing.assert_close(found.mean((1, 2)), torch.full((layer.units,), 1 / 16))
    assert [getattr(module, "fused_attn", None) for module in model.modules()] == before


def test_windows_go_back_to_where_they_were():
    for block in make_swin().layers[0].blocks:
        height, width = block.input_resolution
        places = torch.arange(height * width).float().view(1, height, width, 1)
        shifted = places.roll(tuple(-s for s in block.shift_size), dims=(1, 2))
        windows = window_partition(shifted, block.window_size).view(-1, 1, block.window_area)
        assert torch.equal(xpruner_figures._from_windows(windows, block), places[..., 0])

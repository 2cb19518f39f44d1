"""The example that makes a model fast without training, in small."""

from __future__ import annotations

import os
import sys

import numpy as np
import pytest
import slim
import timm
import torch
from small_swin import KWARGS, SMALL, SWIN

from torch_dimap import LatencyBudget, count_flops, load_pruned

pytestmark = pytest.mark.usefixtures("one_thread")
IMAGE = torch.zeros(1, 3, 16, 16)


def make(seed=0):
    torch.manual_seed(seed)
    return timm.create_model(SWIN, num_classes=2, **SMALL).eval()


@pytest.fixture
def weights(tmp_path):
    torch.save(make().state_dict(), tmp_path / "dense.pth")
    return tmp_path / "dense.pth"


@pytest.fixture
def run(monkeypatch, capsys, weights, tmp_path):
    """Run the script with weights, a target and words of the command line."""

    def call(*words, output="slim.safetensors"):
        arguments = [SWIN, "--checkpoint", weights, "--model-kwargs", *KWARGS, "num_classes=2",
                     "--device", "cpu", "--workers", 0, "--rounds", 3, "--output",
                     tmp_path / output, *words]  # fmt: skip
        monkeypatch.setattr(sys, "argv", ["slim.py", *map(str, arguments)])
        slim.main()
        return capsys.readouterr().out

    return call


def left(out, name):
    line = next(line for line in out.splitlines() if line.startswith(name))
    return [float(word.replace(",", "")) for word in line[len(name) :].split()[:2]]


def test_slim_writes_a_model_that_a_fresh_one_loads(run, data, tmp_path, monkeypatch):
    made = []
    cut = slim.torch_dimap.remove_units
    monkeypatch.setattr(slim.torch_dimap, "remove_units", lambda m: made.append(cut(m)) or made[0])
    out = run("--images", data / "train", "--reconstruct", 20, "--flops", 0.7,
              "--validation", data / "validation")  # fmt: skip
    loaded = load_pruned(make(seed=1), tmp_path / "slim.safetensors")
    x = torch.randn(3, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(loaded(x), made[0].eval()(x), atol=0, rtol=0)
        assert not torch.allclose(loaded(x), make()(x), atol=1e-3)
    counts = [count_flops(model, IMAGE).dense / 1e6 for model in (make(), loaded)]
    assert left(out, "multiply-adds, M") == [round(count, 2) for count in counts]
    assert counts[1] <= 0.7 * counts[0]
    before, after = left(out, "milliseconds")
    assert before > 0 and after > 0
    assert "Reconstructed on 20 images" in out
    assert left(out, "top-1, one-shot")[0] == left(out, "top-1, reconstructed")[0]
    assert all(x % 10 == 0 for x in left(out, "top-1, reconstructed"))  # of ten images


def test_slim_refits_what_is_kept(run, data, tmp_path):
    models = []
    for count in (0, 20):
        name = f"{count}.safetensors"
        run("--amount", 0.5, "--images", data, "--reconstruct", count, output=name)
        models.append(load_pruned(make(seed=1), tmp_path / name))
    dense, x = make(), torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    plain, refitted = models
    assert plain.layers[1].blocks[0].mlp.fc2.weight.shape == (
        refitted.layers[1].blocks[0].mlp.fc2.weight.shape
    )
    with torch.no_grad():
        assert (refitted(x) - dense(x)).norm() < (plain(x) - dense(x)).norm()


def test_slim_meets_a_latency_with_a_search(run, data, tmp_path, monkeypatch):
    asked = []

    def search(model, inputs, target, device):
        asked.append((tuple(inputs.shape), target, device))
        units = slim.torch_dimap.prune_units_to_flops(model, inputs, target).units
        return LatencyBudget({}, units, 0.75, 0.75, 0.74, 1.0)

    monkeypatch.setattr(slim.torch_dimap, "prune_units_to_latency", search)
    out = run("--latency", 0.75, "--reconstruct", 0, "--time-batch", 2)
    assert "Found: 74.0% of the dense model's time" in out
    assert asked == [((2, 3, 16, 16), 0.75, "cpu")]


@pytest.mark.skipif(torch.__version__ < "2.7", reason="needs the exporter of torch 2.7")
def test_slim_exports_for_batches_of_any_size(run, tmp_path):
    for package in ("onnx", "onnxscript"):
        pytest.importorskip(package)
    runtime = pytest.importorskip("onnxruntime")
    run("--amount", 0.5, "--reconstruct", 0, "--onnx", tmp_path / "slim.onnx")
    loaded, x = load_pruned(make(seed=1), tmp_path / "slim.safetensors"), torch.randn(3, 3, 16, 16)
    session = runtime.InferenceSession(tmp_path / "slim.onnx", providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"image": x.numpy()})
    np.testing.assert_allclose(found, loaded(x).detach().numpy(), atol=1e-5)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--amount", 0.5, "--flops", 0.5, "--reconstruct", 0], "not allowed with"),
        (["--reconstruct", 0], "one of the arguments --latency --flops --amount"),
        (["--amount", 1.5, "--reconstruct", 0], "--amount must lie between 0 and 1"),
        (["--amount", 0.5], "--images must name a folder"),
        (["--amount", 0.5, "--images", "nowhere"], "there are no images in nowhere"),
        (["--flops", 0.001, "--reconstruct", 0], "left when all goes"),
        (["--amount", 0.5, "--reconstruct", 0, "--validation", "nowhere"], "there is no folder"),
        (["--amount", 0.5, "--reconstruct", 0, "--onnx", "no/slim.onnx"], "there is no folder"),
    ],
)
def test_slim_says_in_words_what_is_wrong(run, tmp_path, capsys, words, message):
    with pytest.raises((SystemExit, ValueError)) as caught:
        run(*words)
    assert message in str(caught.value) + capsys.readouterr().err
    assert os.listdir(tmp_path) == ["dense.pth"]


def test_slim_refuses_images_of_other_classes(run, data, tmp_path):
    with pytest.raises(SystemExit, match="must hold the 2 classes of the model.* found 1"):
        (tmp_path / "images" / "one").mkdir(parents=True)
        image = (data / "train" / "dark" / "0.png").read_bytes()
        (tmp_path / "images" / "one" / "0.png").write_bytes(image)
        run("--amount", 0.5, "--reconstruct", 0, "--validation", tmp_path / "images")


def test_slim_replaces_a_file_only_when_told(run, tmp_path, weights):
    target = tmp_path / "slim.safetensors"
    target.write_bytes(b"precious")
    with pytest.raises(SystemExit, match="exists: name another file, or give --force"):
        run("--amount", 0.5, "--reconstruct", 0)
    assert target.read_bytes() == b"precious"
    with pytest.raises(SystemExit, match="in use"):
        run("--amount", 0.5, "--reconstruct", 0, "--force", output="dense.pth")
    run("--amount", 0.5, "--reconstruct", 0, "--force")
    load_pruned(make(), target)

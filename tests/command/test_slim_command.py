"""``torch-dimap slim``: what it writes, prints and refuses."""

from __future__ import annotations

import importlib.util
import json

import pytest
import timm
import torch
from small_swin import SWIN

from torch_dimap import count_flops, load_pruned, summarize
from torch_dimap.command import main

NAME = "vit_tiny_patch16_224"
SMALL = ("--img-size", 32, "--num-classes", 5)
pytestmark = pytest.mark.usefixtures("one_thread")


def run(capsys, *arguments):
    code = main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return code, out, err


def make(name=NAME):
    return timm.create_model(name, img_size=32, num_classes=5).eval()


@pytest.fixture
def weights(tmp_path):
    torch.manual_seed(0)
    torch.save(make().state_dict(), tmp_path / "vit.pth")
    return tmp_path / "vit.pth"


def rows(out):
    table = out.split("\n\n")[0].splitlines()[1:]
    return {line.split()[0]: line.replace(",", "").split()[1:3] for line in table}


def test_slim_writes_a_model_that_loads_and_tells_what_is_left(capsys, tmp_path, weights):
    out_file = tmp_path / "slim.safetensors"
    code, out, err = run(
        capsys, "slim", weights, out_file, "--model", NAME, *SMALL, "--heads", 6, "--neurons", "0.5"
    )
    assert (code, err) == (0, "")
    model, dense, image = load_pruned(make(), out_file), make(), torch.zeros(1, 3, 32, 32)
    assert sum(block.attn.num_heads for block in model.blocks) == 36 - 6
    assert all(block.mlp.fc1.out_features % 16 == 0 for block in model.blocks)
    counts = [sum(p.numel() for p in m.parameters()) for m in (dense, model)]
    flops = [count_flops(m, image).dense for m in (dense, model)]
    assert rows(out) == {
        "heads": ["36", "30"],
        "neurons": ["9216", "4608"],
        "parameters": [str(count) for count in counts],
        "multiply-adds": [str(count) for count in flops],
        "bytes": [str(4 * counts[0]), str(out_file.stat().st_size)],
    }
    assert "one image of 3x32x32" in out


def test_slim_goes_on_from_a_slim_file_and_summarize_reads_it(capsys, tmp_path, weights):
    first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    options = ("--model", NAME, *SMALL)
    run(capsys, "slim", weights, first, *options, "--neurons", "0.5")
    code, out, _ = run(capsys, "slim", first, second, *options, "--neurons", "0.5")
    assert code == 0 and rows(out)["neurons"] == ["4608", "2304"]
    code, out, _ = run(capsys, "summarize", second, *options, "--format", "json")
    expected = summarize(load_pruned(make(), second), torch.zeros(1, 3, 32, 32))
    assert code == 0 and json.loads(out) == json.loads(json.dumps(expected.to_dict()))
    (mlp,) = (group for group in json.loads(out)["groups"] if group["name"] == "mlp")
    assert (mlp["units"], mlp["units_kept"]) == (9216, 2304)
    assert run(capsys, "inspect", second)[1].count("slim: 2,304 neurons are left") == 1


@pytest.mark.skipif(torch.__version__ < "2.7", reason="needs the exporter of torch 2.7")
def test_slim_takes_a_model_of_timm_by_name_and_exports_it(capsys, tmp_path):
    for package in ("onnx", "onnxscript"):
        pytest.importorskip(package, reason=f"export to ONNX needs {package}")
    runtime = pytest.importorskip("onnxruntime", reason="needs ONNX Runtime")
    files = tmp_path / "slim.safetensors", tmp_path / "slim.onnx"
    code, _, err = run(
        capsys, "slim", "test_vit", files[0], *SMALL, "--neurons", "0.25", "--onnx", files[1]
    )
    assert (code, err) == (0, "")
    images = torch.randn(3, 3, 32, 32)
    session = runtime.InferenceSession(files[1], providers=["CPUExecutionProvider"])
    (found,) = session.run(["logits"], {"image": images.numpy()})
    with torch.no_grad():
        expected = load_pruned(make("test_vit"), files[0])(images)
    assert (torch.from_numpy(found) - expected).abs().max() <= 2e-6 * expected.abs().max()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["{}/vit.pth", "{}/out"], "nothing is to go: give --heads, --neurons or both"),
        (["{}/vit.pth", "{}/out", "--heads", "0.5"], "--model and a file go together"),
        ([NAME, "{}/out", "--heads", "0.5", "--model", NAME], "--model and a file go together"),
        ([NAME, "{}/vit.pth", "--heads", "0.5"], "vit.pth exists: name another target"),
        (
            ["{}/vit.pth", "{}/vit.pth", "--heads", "0.5", "--force", "--model", NAME],
            "must be another file than the source",
        ),
        ([NAME, "{}/out", "--heads", "0.5", "--onnx", "{}/out"], "must be two files"),
        ([NAME, "{}/out", "--heads", "1.5", *SMALL], "must lie in [0, 1], found 1.5"),
        ([NAME, "{}/out", "--neurons", "1.0", *SMALL], "whole multiples"),
        ([NAME, "{}/out", "--neurons", "0.5", "--multiple", "0", *SMALL], "multiple must be 1"),
        (["vit_tiny_patch16", "{}/out", "--heads", "0.5"], "found neither: did you mean vit_tiny"),
        (["{}/vit.pth", "{}/out", "--heads", "0.5", "--model", SWIN], "or of another shape"),
    ],
)
def test_slim_fails_on_one_line_and_leaves_the_files(capsys, tmp_path, weights, arguments, message):
    before = weights.read_bytes()
    code, out, err = run(capsys, "slim", *(str(word).format(tmp_path) for word in arguments))
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert err.startswith("torch-dimap slim: error: ") and message in err
    assert [path.name for path in tmp_path.iterdir()] == ["vit.pth"]
    assert weights.read_bytes() == before


def test_slim_says_what_to_install_for_onnx(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    code, _, err = run(
        capsys, "slim", NAME, tmp_path / "out", "--heads", "0.5", "--onnx", tmp_path / "x.onnx"
    )
    assert code == 1 and "--onnx needs onnx, which is not installed: pip install" in err
    assert not list(tmp_path.iterdir())

"""Slim models leave torch: compiled, exported and in ONNX Runtime, the same outputs."""

from __future__ import annotations

import pytest
import torch
from conftest import make_swin, make_vit
from torch.nn.utils import prune

from torch_dimap import global_module_aware_structured, group_units, learning, remove_units

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(params=[
    (make_swin, False), (make_vit, False), (make_swin, True), (make_vit, True),
], ids=["swin", "vit", "swin with convolutions", "vit with convolutions"])  # fmt: skip
def slim(request):
    """A model with uneven numbers of units and a layer without any, or without attentions."""
    build, replaced = request.param
    model = build().eval()
    if replaced:
        names = [name for name, _ in model.named_modules() if name.endswith(".attn")]
        learning.replace_attentions(model, dict(zip(names, ["conv3", "conv1"])))
        return learning.collapse_convolutions(model)
    units = group_units(model)
    global_module_aware_structured(
        units, 0.5, multiple=1, minimum=0, pruning_method=prune.RandomUnstructured
    )
    return remove_units(model)


def test_a_slim_model_is_compiled(slim, images):
    torch.compiler.reset()
    assert_same(torch.compile(slim, backend="eager", fullgraph=True)(images), slim(images))


def test_a_compiled_model_follows_the_removal(images):
    torch.compiler.reset()
    model = make_swin().eval()
    compiled = torch.compile(model, backend="eager")
    global_module_aware_structured(group_units(compiled), 0.5, multiple=1)
    expected = compiled(images)
    assert remove_units(compiled) is compiled
    assert_same(compiled(images), expected)
    assert model.layers[1].blocks[0].attn.num_heads < 4


def assert_same(found, expected):
    assert (found - expected).abs().max() <= 2e-6 * expected.abs().max()


def test_a_slim_model_is_exported_by_torch(slim, images):
    program = torch.export.export(slim, (images,))
    assert_same(program.module()(images), slim(images))


@pytest.mark.skipif(torch.__version__ < "2.7", reason="needs the exporter of torch 2.7")
def test_a_slim_model_gives_the_same_in_onnx_runtime(slim, images, tmp_path):
    for package in ("onnx", "onnxscript"):
        pytest.importorskip(package, reason=f"export to ONNX needs {package}")
    runtime = pytest.importorskip("onnxruntime", reason="needs ONNX Runtime")
    program = torch.onnx.export(
        slim, (images,), dynamo=True, verbose=False,
        dynamic_shapes=({0: torch.export.Dim("batch")},),
    )  # fmt: skip
    program.save(tmp_path / "slim.onnx")
    session = runtime.InferenceSession(tmp_path / "slim.onnx", providers=["CPUExecutionProvider"])
    (feed,) = session.get_inputs()
    for batch in (images, images[:3]):
        (found,) = session.run(None, {feed.name: batch.numpy()})
        assert_same(torch.from_numpy(found), slim(batch))

"""Bake, then quantise or export: the zeros stay, and the outputs with them."""

from __future__ import annotations

import pytest
import torch
from conftest import make_swin
from torch import nn

from torch_dimap import (
    global_module_aware_unstructured,
    group_parameters,
    remove_all,
    summarize,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:torch"),
]


@pytest.fixture
def baked():
    model = make_swin().eval()
    global_module_aware_unstructured(group_parameters(model), amount=0.5)
    return remove_all(model)


def test_torchao_keeps_the_zeros_of_a_baked_model(baked, images):
    torchao = pytest.importorskip("torchao.quantization")
    pairs = [pair for group in group_parameters(baked).values() for pair in group]
    zeros = [getattr(*pair) == 0 for pair in pairs]
    with torch.no_grad():
        expected = baked(images)
        torchao.quantize_(baked, torchao.Int8WeightOnlyConfig())
        torch.testing.assert_close(baked(images), expected, rtol=0.1, atol=0.05)
    for (module, name), gone in zip(pairs, zeros):
        assert not getattr(module, name).dequantize()[gone].any()
    with pytest.raises(ValueError, match="stored as plain numbers, found Int8Tensor: prune"):
        global_module_aware_unstructured(pairs, amount=0.5)
    with pytest.raises(ValueError, match="must be stored as plain numbers, found Int8Tensor"):
        summarize(baked)


def test_a_model_of_quantized_modules_is_refused_for_what_it_is(baked):
    quantised = torch.ao.quantization.quantize_dynamic(baked, {nn.Linear})
    with pytest.raises(ValueError, match=r"found quantised ones \(.*, .*, .* and \d+ more\).*bake"):
        group_parameters(quantised)


def test_onnx_runtime_runs_and_quantises_a_baked_model(baked, images, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    quantization = pytest.importorskip("onnxruntime.quantization")

    def run(path):
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        (output,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
        return torch.from_numpy(output)

    whole, small = str(tmp_path / "whole.onnx"), str(tmp_path / "int8.onnx")
    torch.onnx.export(baked, (images,), dynamo=True, verbose=False).save(whole)
    expected = baked(images).detach()
    torch.testing.assert_close(run(whole), expected, rtol=1e-4, atol=1e-5)
    quantization.quantize_dynamic(whole, small, op_types_to_quantize=["MatMul", "Gemm"])
    torch.testing.assert_close(run(small), expected, rtol=0.2, atol=0.1)

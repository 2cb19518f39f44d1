"""Runtimes by name: each returns what runs a model on given images, once.

Those that need an exported model take it from an ONNX file, and make that if it is missing.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import torch_dimap


def eager(model: nn.Module, images: Tensor, file: Path) -> Callable[[], object]:
    return lambda: model(images)


def compiled(model: nn.Module, images: Tensor, file: Path) -> Callable[[], object]:
    fast = torch.compile(model)
    return lambda: fast(images)


def exported(model: nn.Module, images: Tensor, path: Path) -> Path:
    """Export a model, its masks as zeros, unless that was done before."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        model = torch_dimap.remove_all(copy.deepcopy(model))
        torch.onnx.export(model, (images,), path, dynamo=True, verbose=False)
    return path


def onnx_runtime(model: nn.Module, images: Tensor, file: Path) -> Callable[[], object]:
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = torch.get_num_threads()
    settings.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        exported(model, images, file), settings, providers=["CPUExecutionProvider"]
    )
    given = {session.get_inputs()[0].name: images.numpy()}
    return lambda: session.run(None, given)


def openvino(model: nn.Module, images: Tensor, file: Path) -> Callable[[], object]:
    import openvino

    core = openvino.Core()
    network = core.compile_model(
        core.read_model(exported(model, images, file)), "CPU",
        {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "PERFORMANCE_HINT": "LATENCY",
         "INFERENCE_PRECISION_HINT": "f32"},
    )  # fmt: skip
    request, given = network.create_infer_request(), images.numpy()
    return lambda: request.infer([given], share_inputs=True)


RUNTIMES = {
    "eager": eager,
    "compile": compiled,
    "onnxruntime": onnx_runtime,
    "openvino": openvino,
}

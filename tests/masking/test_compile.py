"""A pruned model under torch's transformations gives what the baked model gives."""

from __future__ import annotations

import copy
import importlib
import shutil
import warnings

import pytest
import timm
import torch
import torch.nn.functional as F
from backbones import BYPASSING, baked, build, images, outputs
from torch import nn
from torch.utils.checkpoint import checkpoint

import torch_dimap

pytestmark = pytest.mark.usefixtures("one_thread")


def skip_if_torch_breaks_the_graph(family):
    if torch.__version__.startswith("2.4.") and family != "swin":
        pytest.skip("torch 2.4 breaks the graph where a model reads a layer without calling it")


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    with warnings.catch_warnings():
        # torch names every attribute that a forward sets, which pruning hooks always do
        warnings.filterwarnings("ignore", message="While compiling, we found certain side effects")
        warnings.filterwarnings("ignore", message="The tensor attributes .* were assigned during")
        yield


def pruned(family):
    model = build(family)
    groups = torch_dimap.group_parameters(model)
    torch_dimap.global_module_aware_unstructured(groups, amount=0.55)
    return model


def gradients(model):
    return {name.removesuffix("_orig"): p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize(
    "family", ["swin", "swinv2", "beit", "torchvision swin", "torchvision vit"]
)
def test_compile_takes_the_full_graph(family):
    skip_if_torch_breaks_the_graph(family)
    model, x = pruned(family).train(), images(family)
    dense = baked(model, family)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for one in (compiled, dense):
        outputs(one, x).sum().backward()
    expected = gradients(dense)
    for name, gradient in gradients(model).items():
        if gradient is not None:
            mask = dict(model.named_buffers()).get(f"{name}_mask", True)
            torch.testing.assert_close(gradient, expected[name] * mask, rtol=1e-4, atol=1e-5)


class CalledAndRead(nn.Sequential):
    """Two layers, of which one is read without being called, as some models do."""

    def forward(self, x):
        return F.linear(self[0](x).relu(), self[1].weight, self[1].bias)


@pytest.fixture
def quick_code():
    """Let torch.compile write plain code and build it here: in a third of the time."""
    config = importlib.import_module("torch._inductor.config")
    changes = {"compile_threads": 1, "cpp_cache_precompile_headers": False}
    with config.patch({key: value for key, value in changes.items() if hasattr(config, key)}):
        with config.patch({"cpp.vec_isa_ok": False} if hasattr(config.cpp, "vec_isa_ok") else {}):
            yield


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile's CPU code needs a compiler")
def test_compile_in_its_default_mode_follows_the_optimizer(quick_code):
    torch.manual_seed(0)
    model, x = CalledAndRead(nn.Linear(16, 16), nn.Linear(16, 16)), torch.randn(2, 16)
    torch_dimap.global_module_aware_unstructured(
        [(layer, "weight") for layer in model], amount=0.5
    )
    torch_dimap.hold_masks(model)
    compiled = torch.compile(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    compiled(x).sum().backward()
    optimizer.step()
    found = compiled(x)
    with torch.no_grad():
        in_evaluation = compiled.eval()(x)
        expected = torch_dimap.remove_all(model)(x)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(in_evaluation, expected)


def test_compile_notices_that_its_model_was_pruned():
    model, x = build("torchvision swin").eval(), images("torchvision swin")
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        compiled(x)
        torch_dimap.global_module_aware_unstructured(
            torch_dimap.group_parameters(compiled), amount=0.55
        )
        assert torch.equal(compiled(x), baked(model, "torchvision swin")(x))
        expected = model(x)
        torch_dimap.remove_all(compiled)
        assert torch.equal(compiled(x), expected)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("family", ["swin", "torchvision swin_v2", "torchvision vit"])
def test_export(family, strict):
    if strict:
        skip_if_torch_breaks_the_graph(family)
    model, x = pruned(family).eval(), images(family)
    before = model.state_dict().keys()
    program = torch.export.export(model, (x,), strict=strict).module()
    torch.testing.assert_close(program(x), outputs(baked(model, family), x))
    assert model.state_dict().keys() == before
    assert torch.equal(outputs(model, x), outputs(baked(model, family), x))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_script_takes_the_baked_copy():
    """torch.jit.script compiles no hook that is an object, torch's own pruning included."""
    model, x = pruned("torchvision swin").eval(), images("torchvision swin")
    with pytest.raises(AttributeError):
        torch.jit.script(model)
    script = torch.jit.script(torch_dimap.remove_all(copy.deepcopy(model)))
    torch.testing.assert_close(script(x), model(x))


@pytest.mark.parametrize("family", ["swin", "pvt_v2", "maxvit", *BYPASSING])
def test_autocast(family):
    model, x = pruned(family).train(), images(family)
    dense = baked(model, family)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, expected = outputs(model, x), outputs(dense, x)
    assert torch.equal(found, expected)
    found.float().sum().backward()
    expected.float().sum().backward()
    expected = gradients(dense)
    for name, gradient in gradients(model).items():
        mask = dict(model.named_buffers()).get(f"{name}_mask", True)
        assert torch.equal(gradient, expected[name] * mask)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
@pytest.mark.parametrize("family", ["swin", "swinv2", "beit", "eva02", "transformers SwinModel"])
def test_gradient_checkpointing_of_the_model(family):
    if family.startswith("transformers"):
        pytest.importorskip("transformers")
    elif timm.__version__ == "1.0.9" and family in ("beit", "eva02"):
        pytest.skip("timm 1.0.9 cannot checkpoint the gradients of these, dense or pruned")
    model, x = pruned(family).train(), images(family)
    outputs(model, x).sum().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    if family.startswith("transformers"):
        model.gradient_checkpointing_enable()
    else:
        model.set_grad_checkpointing()
    outputs(model, x).sum().backward()
    for name, p in model.named_parameters():
        assert torch.equal(p.grad, expected[name])


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("family", ["torchvision swin", "torchvision vit", "vit"])
def test_gradient_checkpointing_of_a_part(family, reentrant):
    model, x = pruned(family).train(), images(family)
    outputs(model, x).sum().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    part = model.features if hasattr(model, "features") else None
    part = part or (model.encoder.layers if hasattr(model, "encoder") else model.blocks)
    forward = part.forward
    part.forward = lambda y: checkpoint(forward, y, use_reentrant=reentrant)
    outputs(model, x.requires_grad_()).sum().backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[name])

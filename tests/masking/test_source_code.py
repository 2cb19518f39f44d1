"""Only a layer that a module provably does nothing but call goes without a held mask."""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import torch_dimap
from torch_dimap.masking import readers
from torch_dimap.masking.source_code import only_calls

pytestmark = pytest.mark.usefixtures("one_thread")


def fused(block, x):
    """Read the layer out of sight of the class's code."""
    return F.linear(x, block.qkv.weight)


class Block(nn.Module):
    """Every class below looks as if it called its layer, because of this method."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(4, 4, bias=False)

    def slow(self, x):
        return self.qkv(x)


# The classes of this first part read ``qkv.weight`` in their forward, one way each.


class UnderAnotherName(Block):
    def forward(this, x):
        return fused(this, x)


class Alias(Block):
    def forward(self, x):
        m = self
        return fused(m, x)


class AliasByWalrus(Block):
    def forward(self, x):
        return fused(m, x) if (m := self) is not None else x


class AliasByLoop(Block):
    def forward(self, x):
        return [fused(m, x) for m in (self,)][0]


class AliasByMatch(Block):
    def forward(self, x):
        match self:
            case nn.Module(qkv=layer):
                return F.linear(x, layer.weight)


class AliasByDefault(Block):
    def forward(self, x):
        def run(y, m=self):
            return fused(m, y)

        return run(x)


class AliasByReturn(Block):
    def me(self):
        return self

    def forward(self, x):
        return fused(self.me(), x)


class AliasByMove(Block):
    def forward(self, x):
        return fused(self.to(x.device), x)


class AliasByMethod(Block):
    def forward(self, x):
        return fused(self.slow.__self__, x)


class AliasInNestedFunction(Block):
    def forward(self, x):
        def run():
            return fused(self, x)

        return run()


class Starred(Block):
    def forward(self, x):
        return fused(*(self, x))


class ByKeyword(Block):
    def forward(self, x):
        return fused(block=self, x=x)


class InstallsInInit(Block):
    def __init__(self):
        super().__init__()
        self.impl = lambda x: fused(self, x)

    def forward(self, x):
        return self.impl(x)


class InstallsInDict(Block):
    def __init__(self):
        super().__init__()
        self.impl = {"fast": lambda x: fused(self, x)}

    def forward(self, x):
        return self.impl["fast"](x)


class InstallsHelper(Block):
    def __init__(self):
        super().__init__()
        self.helper = types.SimpleNamespace(block=[self])

    def forward(self, x):
        return fused(self.helper.block[0], x)


def install(module):
    if isinstance(module, Block):
        module.impl = functools.partial(fused, module)


class InstallsByApply(Block):
    def __init__(self):
        super().__init__()
        self.apply(install)

    def forward(self, x):
        return self.impl(x)


class InstallsByMethod(Block):
    def __init__(self):
        super().__init__()
        self.apply(self.install)

    def install(self, module):
        install(module)

    def forward(self, x):
        return self.impl(x)


class CollectsByApply(Block):
    def __init__(self):
        super().__init__()
        parts = []
        self.apply(parts.append)
        self.parts = {"layer": parts[0]}

    def forward(self, x):
        return F.linear(x, self.parts["layer"].weight)


class InstallsByInitialiser(Block):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        nn.init.ones_((block := self).scale)
        self.parts = [block]

    def forward(self, x):
        return fused(self.parts[0], x)


class InstallsInOtherInit(Block):
    def __init__(self):
        super().__init__()
        self.init_weights()

    def init_weights(self):
        install(self)

    def forward(self, x):
        return self.impl(x)


class LayerAlias(Block):
    def forward(self, x):
        qkv = self.qkv
        return F.linear(x, qkv.weight)


class LayerInLambda(Block):
    def forward(self, x):
        return (lambda: F.linear(x, self.qkv.weight))()


class LayerForward(Block):
    def forward(self, x):
        return self.qkv.forward(x)


class LayerProperty(Block):
    @property
    def matrix(self):
        return self.qkv.weight

    def forward(self, x):
        return F.linear(x, self.matrix)


class LayerInCachedProperty(Block):
    @functools.cached_property
    def layers(self):
        return [self.qkv]

    def forward(self, x):
        return F.linear(x, self.layers[0].weight)


class Submodule(Block):
    def forward(self, x):
        return F.linear(x, self.get_submodule("qkv").weight)


class Modules(Block):
    def forward(self, x):
        return F.linear(x, self._modules["qkv"].weight)


class Children(Block):
    def forward(self, x):
        return F.linear(x, next(self.children()).weight)


class NamedModules(Block):
    def forward(self, x):
        return F.linear(x, dict(self.named_modules())["qkv"].weight)


class Dict(Block):
    def forward(self, x):
        return F.linear(x, self.__dict__["_modules"]["qkv"].weight)


class Getattr(Block):
    def forward(self, x):
        return F.linear(x, getattr(self, "qkv").weight)


class OwnGetattr(Block):
    def forward(self, x):
        return F.linear(x, self.__getattr__("qkv").weight)


class GetattrOfSuper(Block):
    def forward(self, x):
        return F.linear(x, super().__getattr__("qkv").weight)


class GetattrOfNamedSuper(Block):
    def forward(self, x):
        return F.linear(x, super(GetattrOfNamedSuper, self).__getattr__("qkv").weight)


def fused_of_super(view, x):
    return fused(view.__self__, x)


class RenamingGetattr(Block):
    def __getattr__(self, name):
        return super().__getattr__("qkv" if name == "first" else name)

    def forward(self, x):
        return F.linear(x, self.first.weight)


class SuperPassedOn(Block):
    def forward(self, x):
        return fused_of_super(super(), x)


class SuperOfSomething(Block):
    def note(self, block, x):
        self.noted = fused(block, x)
        return SuperOfSomething

    def forward(self, x):
        super(self.note(self, x), self).slow(x)
        return self.noted


class Vars(Block):
    def forward(self, x):
        return F.linear(x, vars()["self"].qkv.weight)


class Locals(Block):
    def forward(self, x):
        return fused(locals()["self"], x)


class Eval(Block):
    def forward(self, x):
        return F.linear(x, eval("self.qkv.weight"))


class Static(Block):
    @staticmethod
    def run(block, x):
        return fused(block, x)

    def forward(self, x):
        return self.run(self, x)


class OtherBlock(Block):
    def forward(self, x, block=None):
        return F.linear(x, block.qkv.weight) if block is not None else self.again(x)

    def again(self, x):
        return type(self).forward(self, x, self)


class ReadInBase(LayerAlias):
    def forward(self, x):
        return super().forward(x)


class StarredParameter(Block):
    def forward(*args):
        return fused(*args)


class LambdaInClass(Block):
    forward = lambda self, x: fused(self, x)  # noqa: E731


class PartialMethod(Block):
    forward = functools.partialmethod(fused)


def in_place_of(method):
    @functools.wraps(method)
    def wrapper(self, x):
        return fused(self, x)

    return wrapper


def in_place_of_any(method):
    @functools.wraps(method)
    def wrapper(*args):
        return fused(*args)

    return wrapper


class Decorated(Block):
    @in_place_of
    def forward(self, x):
        return self.qkv(x)


class DecoratedWithStar(Block):
    @in_place_of_any
    def forward(self, x):
        return self.qkv(x)


class BoundByHand:
    def __get__(self, block, kind=None):
        return functools.partial(fused, block)


class Descriptor(Block):
    run = BoundByHand()

    def forward(self, x):
        return self.run(x)


class InSequential(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Sequential(nn.Linear(4, 4, bias=False))

    def slow(self, x):
        return self.qkv(x)

    def forward(self, x):
        return F.linear(x, self.qkv[0].weight)


class InList(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.ModuleList([nn.Linear(4, 4, bias=False)])

    def forward(self, x):
        return [F.linear(x, layer.weight) for layer in self.qkv][0]


class Patchable(Block):
    impl = None

    def forward(self, x):
        return self.impl(x) if self.impl else self.qkv(x)


def patched_with_partial():
    block = Patchable()
    block.impl = functools.partial(fused, block)
    return block


def patched_with_method():
    block = Patchable()
    block.impl = types.MethodType(fused, block)
    return block


def patched_forward():
    block = Patchable()
    block.forward = lambda x: fused(block, x)
    return block


def patched_sequential():
    block = nn.Sequential()
    block.qkv = nn.Linear(4, 4, bias=False)
    block.forward = lambda x: fused(block, x)
    return block


def without_source():
    scope = {"Block": Block, "F": F}
    code = "class C(Block):\n def forward(self, x):\n  return F.linear(x, self.qkv.weight)"
    exec(code, scope)
    return scope["C"]()


READING = [
    value
    for value in list(vars().values())
    if isinstance(value, type) and "forward" in vars(value) and value is not Patchable
]
READING += [patched_with_partial, patched_with_method, patched_forward, patched_sequential]
READING += [without_source]


@pytest.mark.parametrize("make", READING, ids=lambda make: make.__name__)
def test_only_calls_has_no_proof_where_a_layer_is_read(make):
    module = make()
    assert not only_calls(module, "qkv")


@pytest.mark.parametrize("make", READING, ids=lambda make: make.__name__)
def test_a_layer_that_is_read_has_no_old_weights(make):
    model = nn.ModuleDict({"attn": make()})
    [[layer, name]] = torch_dimap.group_parameters(model)["qkv"]
    torch_dimap.dimap_unstructured(layer, name, amount=0.5)
    state = {
        key: torch.randn_like(value) if key.endswith("_orig") else value
        for key, value in model.state_dict().items()
    }
    model.load_state_dict(state)
    x = torch.randn(3, 4)
    for _ in range(2):
        out = model["attn"](x)
        torch.testing.assert_close(out, x @ (layer.weight_orig * layer.weight_mask).T)
        out.sum().backward()  # a second one through an old weight fails
    assert layer.weight_orig.grad is not None


# These only call their layer, and need no more than torch's own hook.


class Plain(Block):
    def forward(self, x):
        return self.qkv(x)


class PlainUnderAnotherName(Block):
    def forward(this, x):
        return this.qkv(x)


class CallsInLambda(Block):
    def forward(self, x):
        return (lambda y: self.qkv(y))(x)


class PassesMethodOn(Block):
    def forward(self, x):
        return checkpoint(self.slow, x, use_reentrant=False)


class CallsSuper(Plain):
    def forward(self, x):
        return super().forward(x) + super(CallsSuper, self).slow(x)


class Initialises(Plain):
    def __init__(self):
        super().__init__()
        self.register_buffer("scale", torch.ones(1))
        self.apply(self._init_weights)
        self.reset_parameters()

    def reset_parameters(self):
        nn.init.xavier_uniform_(self.qkv.weight, gain=0.5)

    def _init_weights(self, m):
        if isinstance(m, nn.Linear):
            torch.nn.init.zeros_(m.weight)


class Delegates(Plain):
    def train(self, mode=True):
        super().train(mode)
        self.cache = {}
        return super().train(mode)

    def _apply(self, fn, *args, **kwargs):
        self.cache = {}
        return super()._apply(fn, *args, **kwargs)


class WithoutGradients(Plain):
    @torch.no_grad()
    def quick(self, x):
        return self.qkv(x)

    @staticmethod
    def scale(x):
        return 2 * x

    @classmethod
    def make(cls, *args):
        return cls(*args)

    @property
    def width(self):
        return self.training


class ActsByFunctionOfTorch(Plain):
    def __init__(self):
        super().__init__()
        self.act = F.relu

    def forward(self, x):
# a comment that is not indented  # noqa: E115
        return self.act(self.qkv(x))


class FillsSequential(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Sequential()
        self.qkv.add_module("proj", nn.Linear(4, 4, bias=False))
        for m in self.qkv.modules():
            if isinstance(m, nn.Linear):
                nn.init.xavier_uniform_(m.weight)

    def forward(self, x):
        return self.qkv(x)


CALLING = [
    Plain,
    PlainUnderAnotherName,
    CallsInLambda,
    PassesMethodOn,
    CallsSuper,
    Initialises,
    Delegates,
    WithoutGradients,
    ActsByFunctionOfTorch,
    FillsSequential,
]


@pytest.mark.parametrize("make", CALLING)
def test_only_calls_proves_what_is_safe(make):
    module = make()
    assert only_calls(module, "qkv")
    assert not only_calls(module, "proj")  # which no code names
    model = nn.ModuleDict({"attn": module})
    [[layer, name]] = torch_dimap.group_parameters(model)["qkv"]
    torch_dimap.dimap_unstructured(layer, name, amount=0.5)
    assert not any(readers.refresh in m._forward_pre_hooks.values() for m in model.modules())
    for _ in range(2):
        module(torch.ones(3, 4)).sum().backward()


def test_only_calls_proves_every_layer_of_a_sequential():
    class Fusible(nn.Sequential):
        def fuse(self):  # which no forward runs
            return self[0].weight * 2

    assert only_calls(Fusible(nn.Linear(2, 2)), "0")


@pytest.mark.parametrize("name", ["__iter__", "__call__", "forward"])
def test_only_calls_has_no_proof_for_a_sequential_that_runs_otherwise(name):
    kind = type("Other", (nn.Sequential,), {name: lambda self, *args: iter([fused])})
    assert not only_calls(kind(nn.Linear(2, 2)), "0")


def test_only_calls_proves_a_compiled_module():
    module = Plain()
    module.compile(backend="eager")
    assert only_calls(module, "qkv")


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_only_calls_has_no_proof_for_a_scripted_module():
    assert not only_calls(torch.jit.script(Plain()), "qkv")


def test_only_calls_has_no_proof_once_a_class_is_patched(monkeypatch):
    assert only_calls(Plain(), "qkv")
    monkeypatch.setattr(Plain, "forward", fused)
    assert not only_calls(Plain(), "qkv")


@pytest.mark.parametrize("bind", [functools.partial, types.MethodType])
def test_only_calls_has_no_proof_where_a_class_holds_a_bound_function(monkeypatch, bind):
    module = Plain()
    monkeypatch.setattr(Plain, "run", bind(fused, module), raising=False)
    assert not only_calls(module, "qkv")


@pytest.mark.parametrize("change", ["self.qkv(x)", "\0", "(", None])
def test_only_calls_has_no_proof_where_the_file_was_changed_since(tmp_path, monkeypatch, change):
    path = tmp_path / "changing_file.py"
    code = (
        "from torch import nn\nfrom torch.nn import functional as F\n\n\n"
        "class Changing(nn.Module):\n    def forward(self, x):\n"
        "        return F.linear(x, self.qkv.weight)\n"
    )
    path.write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "changing_file", raising=False)
    module = importlib.import_module("changing_file").Changing()
    read = "F.linear(x, self.qkv.weight)"
    path.write_text("# nothing left\n" if change is None else code.replace(read, change))
    assert not only_calls(module, "qkv")


def test_only_calls_reads_the_source_once(monkeypatch):
    assert only_calls(Plain(), "qkv")
    monkeypatch.setattr(inspect, "getblock", lambda lines: pytest.fail("read again"))
    assert only_calls(Plain(), "qkv")
    assert only_calls(Plain(), "qkv")

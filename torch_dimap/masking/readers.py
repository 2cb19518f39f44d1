"""Masks that hold where a model reads ``layer.weight`` without calling the layer.

torch's pruning computes ``weight = weight_orig * weight_mask`` in a pre-hook of the
layer. torchvision's Swins, timm's SwinV2 and BEiT, and ``nn.MultiheadAttention`` never
call some of their layers: the hook does not run, the layer keeps old weights and gets no
gradient. So the layer's *reader*, the module whose ``forward`` uses it, gets a pre-hook
too, :func:`refresh`, which runs the hooks of the pruned layers directly inside it.

A reader's need is read off the source code of its class: where a layer occurs only as
``self.layer(...)`` it is called, and nothing is done. Everything else counts as a read;
a hook too many costs one more multiplication by the mask.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import nn
from torch.nn.utils import prune


class Reader(NamedTuple):
    """A module whose forward uses a layer, and the name by which it does."""

    module: nn.Module
    attribute: str


class Place(NamedTuple):
    """Where in a model a module is."""

    name: str
    readers: list[Reader]  # several if the module is shared


# A pruning call gets layers, not the model they are in: what is found out about their
# readers when the model is walked is kept here, as long as the modules live.
_READERS: WeakKeyDictionary[nn.Module, WeakSet[nn.Module]] = WeakKeyDictionary()


class PrunedTensor(NamedTuple):
    """A tensor behind a mask."""

    label: str  # its name in the model
    module: nn.Module
    name: str


def pruned_tensors(model: nn.Module, caller: str) -> Iterator[PrunedTensor]:
    """Yield a model's pruned tensors, under each of their names.

    Raises:
        RuntimeError: if one has a pruning hook, but no mask or no original.
    """
    for place, module in model.named_modules(remove_duplicate=False):
        for name in (method._tensor_name for method in pruning_methods(module)):
            label = f"{place}.{name}".removeprefix(".")
            if f"{name}_orig" not in module._parameters or f"{name}_mask" not in module._buffers:
                raise RuntimeError(
                    f"{caller}: {label} must have a parameter {name}_orig and a buffer "
                    f"{name}_mask, found not both: build the model again and load its weights."
                )
            yield PrunedTensor(label, module, name)


def pruning_methods(module: nn.Module) -> list[prune.BasePruningMethod]:
    """Return the hooks with which torch prunes the tensors of one module."""
    hooks = module._forward_pre_hooks.values()
    return [hook for hook in hooks if isinstance(hook, prune.BasePruningMethod)]


def hold_masks(model: nn.Module) -> nn.Module:
    """Make the masks of a pruned model hold in layers that it reads without calling.

    Layers listed by :func:`torch_dimap.group_parameters` need no such call. It is for
    layers that were listed by hand, or pruned with ``torch.nn.utils.prune`` directly.

    Args:
        model: the model, not only the pruned layers. :func:`torch_dimap.remove_all`
            undoes it.

    Returns:
        ``model``.

    Raises:
        TypeError: if ``model`` is no module.

    Example:
        >>> attention = nn.MultiheadAttention(8, 2)  # calls no out_proj, only reads it
        >>> _ = prune.l1_unstructured(attention.out_proj, "weight", amount=0.5)
        >>> attention = hold_masks(attention)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"hold_masks(): model must be an nn.Module, found {type(model).__name__}.")
    for module, place in survey(model).items():
        if pruning_methods(module):
            note_readers(module, place.readers)
            for reader in known_readers([module]):
                hold(reader)
    return model


def survey(model: nn.Module) -> dict[nn.Module, Place]:
    """Walk a model once; say for every module its name and who may read its weights."""
    places: dict[nn.Module, Place] = {}
    enclosing: dict[str, tuple[str, nn.Module] | None] = {"": None}
    for name, module in model.named_modules(remove_duplicate=False):
        place = places.setdefault(module, Place(name, []))
        reader = enclosing[name.rpartition(".")[0]]
        if reader is not None:
            below = name.removeprefix(reader[0]).removeprefix(".")
            place.readers.append(Reader(reader[1], below.partition(".")[0]))
        enclosing[name] = (name, module) if _has_forward(module) else reader
    return places


def note_readers(layer: nn.Module, readers: Iterable[Reader]) -> None:
    """Remember which of its readers may use a layer without calling it."""
    for reader in readers:
        if not _only_calls(reader):
            _READERS.setdefault(layer, WeakSet()).add(reader.module)


def known_readers(layers: Iterable[nn.Module]) -> list[nn.Module]:
    """Return the modules noted for the layers, each of them once."""
    found = (reader for layer in layers for reader in _READERS.get(layer, ()))
    return list(dict.fromkeys(found))


def hold(reader: nn.Module) -> None:
    """Give a reader the hook that updates the layers inside it, unless it has it."""
    if refresh not in reader._forward_pre_hooks.values():
        reader.register_forward_pre_hook(refresh)


def release(reader: nn.Module) -> None:
    """Take the hook from a reader without pruned layers."""
    if next(_pruned_inside(reader), None) is None:
        hooks = reader._forward_pre_hooks
        for key in [key for key, hook in hooks.items() if hook is refresh]:
            del hooks[key]


def refresh(module: nn.Module, inputs: Any) -> None:
    """Run the pruning hooks of the layers directly inside a module: its pre-hook.

    It looks for them on every call and holds no reference, so that the model can be
    copied, pickled and moved. After the last ``prune.remove`` it takes itself away.
    """
    pruned = list(_pruned_inside(module))
    for layer, method in pruned:
        method(layer, inputs)
    if not pruned and not torch.compiler.is_compiling():
        release(module)


def _pruned_inside(module: nn.Module) -> Iterator[tuple[nn.Module, prune.BasePruningMethod]]:
    for child in module.children():
        for method in pruning_methods(child):
            yield child, method
        if not _has_forward(child):  # a mere container, such as ModuleList
            yield from _pruned_inside(child)


def _has_forward(module: nn.Module) -> bool:
    if isinstance(module, torch.jit.ScriptModule):  # whose class cannot be asked
        return True
    return type(module).forward is not nn.Module.forward


def _only_calls(reader: Reader) -> bool:
    """Say whether the source code proves that a reader does nothing but call a layer."""
    if "forward" in vars(reader.module):  # patched on the instance
        return False
    kind: Any = type(reader.module)
    if kind.forward is nn.Sequential.forward:
        return True
    bases = tuple(base for base in kind.__mro__ if base not in (nn.Module, object))
    # The functions belong to the question: a class may be patched between two of them.
    functions = (f for base in bases for f in vars(base).values() if inspect.isfunction(f))
    return reader.attribute in _only_called(kind, bases, tuple(functions))


@functools.cache
def _only_called(kind: Any, bases: tuple[type, ...], functions: tuple[Any, ...]) -> set[str]:
    """Return the names that occur in a class's code as ``x.name(...)`` and not otherwise."""
    members = {name: inspect.getattr_static(kind, name) for name in dir(kind)}
    methods = [
        member
        for name, member in members.items()
        if inspect.isfunction(member) and member is not vars(nn.Module).get(name)
    ]
    called: set[str] = set()
    read: set[str] = set()
    try:
        for method in methods:  # those in use: overridden ones prove nothing
            called |= _attributes(method)[0]
        for source in [*bases, *methods]:  # which may be others, put there from outside
            read |= _attributes(source)[1]
        if any(_hands_itself_on(method) for method in methods):
            return set()  # to code that may read anything
    except (OSError, TypeError, SyntaxError):  # no source
        return set()
    return called - read


def _attributes(source: Any) -> tuple[set[str], set[str]]:
    """Return the attributes that a class or function calls, and those it only reads."""
    code = list(ast.walk(ast.parse(textwrap.dedent(inspect.getsource(source)))))
    functions = {node.func for node in code if isinstance(node, ast.Call)}
    loads = [n for n in code if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Load)]
    called = {node.attr for node in loads if node in functions}
    return called, {node.attr for node in loads if node not in functions}


def _hands_itself_on(method: Any) -> bool:
    """Say whether a method, but for those that make weights, passes ``self`` to a function."""
    if method.__name__.strip("_").startswith("init"):
        return False
    code = ast.walk(ast.parse(textwrap.dedent(inspect.getsource(method))))
    calls = [n for n in code if isinstance(n, ast.Call) and ast.unparse(n.func) != "super"]
    passed = [x for n in calls for x in (*n.args, *(k.value for k in n.keywords))]
    return any(isinstance(x, ast.Name) and x.id == "self" for x in passed)

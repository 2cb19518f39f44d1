"""Masks that hold where a model reads ``layer.weight`` without calling the layer.

torch's pruning computes ``weight = weight_orig * weight_mask`` in a pre-hook of the
layer. torchvision's Swins, timm's SwinV2 and BEiT, and ``nn.MultiheadAttention`` never
call some of their layers: the hook does not run, the layer keeps old weights and gets no
gradient. So the layer's *reader*, the module whose ``forward`` uses it, gets a pre-hook
too, :func:`refresh`, which runs the hooks of the pruned layers directly inside it.

Where the source code of a reader's class proves that it only calls a layer, nothing is
done: see :mod:`torch_dimap.masking.source_code`. All else counts as a read.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import nn
from torch.nn.utils import prune

from torch_dimap.masking.layers import pruning_methods
from torch_dimap.masking.source_code import never_calls, only_calls, runs_in_sequence


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
    enclosing: dict[str, list[tuple[str, nn.Module]]] = {"": []}
    for name, module in model.named_modules(remove_duplicate=False):
        place = places.setdefault(module, Place(name, []))
        parent = name.rpartition(".")[0]
        around = enclosing[parent]
        for outer, reader in around:
            below = name.removeprefix(outer).removeprefix(".")
            place.readers.append(Reader(reader, below.partition(".")[0]))
        if not _has_forward(module):
            enclosing[name] = around
        elif runs_in_sequence(module) and around and around[-1][0] == parent:
            enclosing[name] = [*around, (name, module)]  # ``self.mlp[0].weight`` goes inside
        else:
            enclosing[name] = [(name, module)]
    return places


def note_readers(layer: nn.Module, readers: Iterable[Reader]) -> None:
    """Remember which of its readers may use a layer without calling it."""
    for reader in readers:
        if not only_calls(reader.module, reader.attribute):
            _READERS.setdefault(layer, WeakSet()).add(reader.module)


def known_readers(layers: Iterable[nn.Module]) -> list[nn.Module]:
    """Return the modules noted for the layers, each of them once."""
    found = (reader for layer in layers for reader in _READERS.get(layer, ()))
    return list(dict.fromkeys(found))


def is_never_called(layer: nn.Module) -> bool:
    """Say whether the module that holds a layer is known only to read it: no hook of its runs."""
    return any(
        never_calls(reader, name)
        for reader in known_readers([layer])
        for name, child in reader.named_children()
        if child is layer
    )


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
        if not _has_forward(child) or runs_in_sequence(child):  # a container
            yield from _pruned_inside(child)


def _has_forward(module: nn.Module) -> bool:
    if isinstance(module, torch.jit.ScriptModule):  # whose class cannot be asked
        return True
    return type(module).forward is not nn.Module.forward

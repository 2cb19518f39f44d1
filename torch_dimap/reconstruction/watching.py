"""What a layer's weight is multiplied with, however a model comes to do it.

Below autograd every product of a network is one of a few operators, and the weight is one of
its operands, whole or in rows, whether the layer is called, read by its parent, part of
``nn.MultiheadAttention``, or a 1x1 convolution. So the operators are watched, not the layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

from torch_dimap.masking import Layer

aten = torch.ops.aten

# Operator -> which of its arguments are the inputs and the weight, and which is a bias.
_PRODUCTS = {
    aten.linear.default: (0, 1),
    aten.addmm.default: (1, 2),
    aten.mm.default: (0, 1),
    aten.bmm.default: (0, 1),
    aten.convolution.default: (0, 1),
}
_BIASES = {
    aten.linear.default: 2,
    aten.addmm.default: 0,
    aten.convolution.default: 2,
    aten.add.Tensor: 1,
    aten.add_.Tensor: 1,
}


class Use(NamedTuple):
    """One product with rows of a layer's weight."""

    layer: Layer
    rows: tuple[int, int]  # first, and one behind the last
    inputs: Tensor  # a row for each token: n x d
    version: int  # rises when the inputs' memory is changed in place


class Watch(TorchDispatchMode):
    """Hand over the inputs of some layers while a forward runs, just before each product.

    Args:
        layers: whose weights to look for.
        seen: called with every :class:`Use`; what it raises ends the forward.
    """

    def __init__(self, layers: Sequence[Layer], seen: Callable[[Use], None]) -> None:
        super().__init__()
        self.layers, self.seen = layers, seen

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _PRODUCTS:
            self.multiply(func, args, kwargs)
        return func(*args, **(kwargs or {}))

    def multiply(self, func: Any, args: Any, kwargs: Any) -> dict[Layer, bool]:
        """Hand over the uses that a product is; return its layers, and whether each is clear."""
        found = {}
        x, w = (args[i] for i in _PRODUCTS[func])
        for layer in self.layers:
            weight = getattr(layer.module, layer.name)
            if _same_memory(w, weight):
                uses = [] if kwargs else _uses(func, weight, x, w, args)  # addmm's factors
                for rows, inputs in uses:
                    self.seen(Use(layer, rows, inputs, _version(x)))
                found[layer] = bool(uses)
        return found


class Account(Watch):
    """A watch that keeps account of all else that a forward does with the layers.

    Attributes:
        biased: labels of the layers to whose outputs the bias that their module holds was added.
        unclear: labels of those that were in a product of another kind.
        read: labels of those whose weight was an operand of what is no product.
        bias_read: labels of those whose bias was used otherwise than in that addition.
    """

    def __init__(self, layers: Sequence[Layer], seen: Callable[[Use], None]) -> None:
        super().__init__(layers, seen)
        self.biased: set[str] = set()
        self.unclear: set[str] = set()
        self.read: set[str] = set()
        self.bias_read: set[str] = set()
        # Products to which no bias was added yet, as they were.
        self._bare: dict[str, tuple[Tensor, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        product = func in _PRODUCTS
        multiplied = self.multiply(func, args, kwargs) if product else {}
        output = func(*args, **(kwargs or {}))
        read = _memory(args, kwargs) - _memory(output)  # without what is only viewed
        added = args[_BIASES[func]] if func in _BIASES and _BIASES[func] < len(args) else None
        for layer in self.layers:
            label, bias = layer.label, bias_of(layer)
            if not multiplied.get(layer, True):
                self.unclear.add(label)
            if layer not in multiplied and _memory(getattr(layer.module, layer.name)) & read:
                (self.unclear if product else self.read).add(label)
            if bias is None:
                continue
            if added is None and layer in multiplied:
                self._bare[label] = output, _version(output)
            elif _memory(getattr(bias.module, bias.name)) & read:
                bare, version = self._bare.pop(label, (None, 0))
                same = bare is not None and _version(bare) == version
                onto = layer in multiplied or same and _memory(bare) & _memory(args[0])
                ours = onto and not kwargs and _memory(added) & read
                (self.biased if ours else self.bias_read).add(label)
        return output


def bias_of(layer: Layer) -> Layer | None:
    """Return the bias that belongs to a layer's weight, if its module holds one."""
    name = {"weight": "bias", "in_proj_weight": "in_proj_bias"}.get(layer.name)
    if name is None or not isinstance(getattr(layer.module, name, None), Tensor):
        return None
    return Layer(f"{layer.label.removesuffix(layer.name)}{name}", layer.module, name)


def _version(tensor: Tensor) -> int:
    """Return how often a tensor was changed in place, if that is known."""
    return 0 if tensor.is_inference() else tensor._version


def _memory(*values: Any) -> set[int]:
    """Say where the tensors among some values lie; what is sharded has no memory of its own."""
    found = (value for value in tree_leaves(values) if isinstance(value, Tensor) and value.numel())
    return {x.untyped_storage().data_ptr() for x in found if not is_traceable_wrapper_subclass(x)}


def _same_memory(a: Tensor, b: Tensor) -> bool:
    """Say whether two tensors, both alive, are views of the same memory."""
    if is_traceable_wrapper_subclass(a) or is_traceable_wrapper_subclass(b):
        return False
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr() and a.numel() > 0


def _uses(
    func: Any, weight: Tensor, x: Tensor, w: Tensor, args: Any
) -> list[tuple[tuple[int, int], Tensor]]:
    """Return rows of a weight and what they are multiplied with; nothing if that is unclear."""
    if func is aten.convolution.default:
        return _convolved(weight, x, w, *args[3:9])
    if w.dim() == 3 and (len(w) == 1 or w.stride(0) == 0):  # one matrix, for a batch of inputs
        w = w[0]
    w = w if func is aten.linear.default else w.mT
    stride = weight.stride()[:2]
    offset = w.storage_offset() - weight.storage_offset()
    alike = [w.stride(i) == stride[i] or w.shape[i] == 1 for i in range(2)] if w.dim() == 2 else []
    if not alike or not all(alike) or w.shape[1] != weight.shape[1] or offset % stride[0]:
        return []
    first = int(offset // stride[0])
    return [((first, first + len(w)), x.reshape(-1, x.shape[-1]))]


def _convolved(
    weight: Tensor, x: Tensor, w: Tensor, stride: Any, padding: Any, dilation: Any,
    transposed: bool, output_padding: Any, groups: int,
) -> list[tuple[tuple[int, int], Tensor]]:  # fmt: skip
    if transposed or any(padding) or any(side != 1 for side in w.shape[2:]):
        return []
    if len(w) != len(weight):
        return []
    x = x[(slice(None), slice(None), *(slice(None, None, step) for step in stride))]
    parts = x.movedim(1, -1).reshape(-1, x.shape[1]).chunk(groups, 1)
    size = len(weight) // groups
    return [((i * size, (i + 1) * size), part) for i, part in enumerate(parts)]

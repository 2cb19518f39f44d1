"""What the products of a traced network cost, and which weights they multiply by.

A product is credited to its weights by walking the traced graph from its operands
back to the parameters. Where the operator was called from does not matter, so a layer
whose parent reads ``child.weight`` and never calls the child still gets its due.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from torch_dimap.masking import Layer
from torch_dimap.text import name_some

# fvcore's form of a formula: the operator's traced inputs and outputs -> FLOPs, or a
# Counter that says who they belong to.
Handle = Callable[[list, list], Any]

# Formulas of fvcore's own for these err without a word where one operand is
# broadcast (they look at the first operand only), and fail for vectors. Name -> which
# inputs are multiplied. Each entry of the output is a sum over the first one's last axis.
_PRODUCTS = {
    "aten::linear": (0, 1),
    "aten::matmul": (0, 1),
    "aten::mm": (0, 1),
    "aten::bmm": (0, 1),
    "aten::mv": (0, 1),
    "aten::dot": (0, 1),
    "aten::addmm": (1, 2),
    "aten::baddbmm": (1, 2),
    "aten::addmv": (1, 2),
}
_CONVOLUTIONS = ("aten::_convolution", "aten::_convolution_mode")
_BOOKED = {*_PRODUCTS, *_CONVOLUTIONS, "aten::einsum"}

# By name, so that products which later versions of torch bring are noticed too. An
# outer product sums nothing and counts like any other elementwise operator: nothing.
_MULTIPLIES = re.compile(
    r"^(?!aten|prim)|PythonOp|CallFunction"
    r"|aten::(?!.*(gamma|cumm|hamming|upsample))"
    r".*(mm|mv|dot|matmul|linear|conv|attention|lstm|gru|rnn|transformer|inner|kron|cdist"
    r"|matrix_power)"
)
# fvcore passes over these together with the operators inside them.
_NESTED = ("prim::If", "prim::Loop", "prim::CallMethod")


def product_handles(model: nn.Module, layers: list[Layer]) -> dict[str, Handle]:
    """Give every kind of product a formula that credits the weights it multiplies by."""
    credit = _credit(model, layers)

    def product(first: int, second: int) -> Handle:
        def handle(inputs: list, outputs: list) -> Counter:
            flops = math.prod(_shape(outputs[0])) * _shape(inputs[first])[-1]
            return credit("matmul", flops, inputs[first], inputs[second])

        return handle

    def convolution(inputs: list, outputs: list) -> Counter:
        transposed = len(inputs) > 7 and inputs[6].toIValue()
        pixels = _shape(inputs[0] if transposed else outputs[0])
        flops = math.prod(pixels) * math.prod(_shape(inputs[1])[1:])
        return credit("conv", flops, inputs[1])

    def einsum(inputs: list, outputs: list) -> Counter:
        operands = list(inputs[1].node().inputs())
        summed = _summed(inputs[0].toIValue(), [_shape(x) for x in operands])
        return credit("einsum", math.prod(_shape(outputs[0])) * summed, *operands)

    def nested(inputs: list, outputs: list) -> None:
        _refuse([outputs[0].node().kind()])

    return {
        **{name: product(*operands) for name, operands in _PRODUCTS.items()},
        **dict.fromkeys(_CONVOLUTIONS, convolution),
        **dict.fromkeys(_NESTED, nested),
        "aten::einsum": einsum,
        "aten::scaled_dot_product_attention": _attention,
    }


def _shape(value: Any) -> list[int]:
    return value.type().sizes()


def _attention(inputs: list, outputs: list) -> int:
    """Count QK^T and AV; a causal mask is no saving, as in the unfused form."""
    query, key = _shape(inputs[0]), _shape(inputs[1])
    *positions, channels = _shape(outputs[0])
    return math.prod(positions) * key[-2] * (query[-1] + channels)


def _summed(equation: str, shapes: list[list[int]]) -> int:
    """Return how many products an einsum of two operands adds up to an output entry."""
    if len(shapes) > 2:
        _refuse([f"aten::einsum of {len(shapes)} operands"])
    terms, _, result = equation.replace(" ", "").partition("->")
    sizes: list[dict[str, int]] = []
    for term, shape in zip(terms.split(","), shapes):
        left, _, right = term.partition("...")
        ends = shape[: len(left)] + shape[len(shape) - len(right) :]
        sizes.append(dict(zip(left + right, ends)))
    # What only one operand has is added up before the product.
    common = set(sizes[0]).intersection(*sizes[1:]) if len(sizes) > 1 else set()
    summed = [sizes[0][letter] for letter in common - set(result)]
    return math.prod(summed) if summed else 0  # elementwise, or no product at all


def _credit(model: nn.Module, layers: list[Layer]) -> Callable[..., Counter]:
    """Return a function that books the FLOPs of a product on the weights in it."""
    # A trace's inputs are those of the model, then its distinct states, in this order.
    states = list({id(state): None for state in model.state_dict(keep_vars=True).values()})
    by_id = {id(layer.parameter): layer for layer in layers}
    found: dict[int, frozenset[Layer] | None] = {}

    def weights(value: Any) -> frozenset[Layer] | None:
        """Say which layers a traced value is made of; None if it holds activations."""
        if value.unique() not in found:
            found[value.unique()] = look_up(value, value.node())
        return found[value.unique()]

    def look_up(value: Any, node: Any) -> frozenset[Layer] | None:
        if node.kind() == "prim::Param":
            index = value.offset() - node.outputsSize() + len(states)
            if index < 0:
                return None
            return frozenset(filter(None, [by_id.get(states[index])]))
        if node.kind() == "aten::size":  # a shape holds no data
            return frozenset()
        parts: list[frozenset[Layer]] = []
        for x in node.inputs():  # activations come first as a rule, and settle it
            part = weights(x)
            if part is None:
                return None
            parts.append(part)
        # What a product gives is no weight any more; its own FLOPs are booked.
        return frozenset() if node.kind() in _BOOKED else frozenset().union(*parts)

    def credit(operator: str, flops: int, *operands: Any) -> Counter:
        listed = frozenset().union(*(weights(x) or () for x in operands))
        if not listed:
            return Counter({operator: flops})
        counts: Counter = Counter()
        size = sum(layer.parameter.numel() for layer in listed)
        if not size:  # all units of these layers have been removed: there is nothing to multiply
            return counts
        for layer in sorted(listed, key=lambda layer: layer.label):
            # Weights that have been concatenated share by size.
            counts[layer] = (flops - counts.total()) * layer.parameter.numel() // size
            size -= layer.parameter.numel()
        return counts

    return credit


def refuse_unknown(operators: Iterable[str]) -> None:
    """Raise if an operator without a formula may multiply matrices."""
    unknown = [name for name in operators if _MULTIPLIES.search(name)]
    if unknown:
        _refuse(unknown)


def _refuse(operators: list[str]) -> None:
    detects = any(name.startswith("torchvision::") for name in operators)
    raise NotImplementedError(
        f"count_flops(): every operator that multiplies matrices must have a formula, found "
        f"{name_some(operators)} without one: "
        + ("of a detector count the backbone, count_flops(model.backbone, images), since the rest "
           "depends on what is in the image; or " if detects else "")
        + "pass op_handles={name: formula}, or {name: None} to count it as nothing."
    )  # fmt: skip

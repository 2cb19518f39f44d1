"""What a model is called with to be counted: tensors, a dict of them, or a shape."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

Inputs = Tensor | tuple[Any, ...] | Mapping[str, Any]


def arguments_for(model: nn.Module, inputs: Inputs, caller: str) -> Tensor | tuple | dict[str, Any]:
    """Return what to call a model with; zeros where a shape is given.

    Raises:
        TypeError: for what is neither a tensor, a tuple, a dict nor a shape.
    """
    if _is_shape(inputs):
        like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
        return torch.zeros(*inputs, dtype=like.dtype, device=like.device)
    if isinstance(inputs, Mapping) and all(isinstance(name, str) for name in inputs):
        return dict(inputs)
    if isinstance(inputs, (Tensor, tuple)):
        return inputs
    raise TypeError(
        f"{caller}: inputs must be a tensor or a tuple to call the model with, a dict of arguments "
        f"by name, or a shape such as (1, 3, 224, 224), found {type(inputs).__name__}."
    )


@contextmanager
def called_by_place(
    model: nn.Module, inputs: Tensor | tuple | dict[str, Any]
) -> Iterator[Tensor | tuple]:
    """Let a model be called with tensors alone, one after another, as a tracer calls it."""
    if not isinstance(inputs, dict):
        yield inputs
        return
    tensors = {name: value for name, value in inputs.items() if isinstance(value, Tensor)}
    others = {name: value for name, value in inputs.items() if name not in tensors}
    forward: Callable[..., Any] = model.forward
    had = vars(model).get("forward")

    def by_place(*values: Tensor) -> Any:
        return forward(**dict(zip(tensors, values)), **others)

    vars(model)["forward"] = by_place
    try:
        yield tuple(tensors.values())
    finally:
        del vars(model)["forward"]
        if had is not None:
            vars(model)["forward"] = had


def shapes_in(inputs: Inputs) -> list[tuple[int, ...]]:
    """Return the shapes of the tensors that a model is called with."""
    if _is_shape(inputs):
        return [tuple(inputs)]
    listed = inputs.values() if isinstance(inputs, Mapping) else inputs
    tensors = [inputs] if isinstance(inputs, Tensor) else listed
    return [tuple(x.shape) for x in tensors if isinstance(x, Tensor)]


def _is_shape(inputs: Any) -> TypeGuard[tuple[int, ...]]:
    """Tell a shape from a tuple to call a model with, which has a tensor in it."""
    return (
        isinstance(inputs, (tuple, torch.Size))
        and bool(inputs)
        and all(isinstance(side, int) and not isinstance(side, bool) for side in inputs)
    )

"""Gates on units: factors that multiply what a unit hands on, where its reader takes it in."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from torch_dimap.masking import is_never_called, refuse_sharded_model
from torch_dimap.text import name_some
from torch_dimap.units import UnitLayer, check_units

Units = Mapping[str, Iterable[UnitLayer]] | Iterable[UnitLayer]
# Called in every forward: a factor for each unit, (units,), or for each image and unit,
# (images, units).
Gates = Callable[[], Tensor]


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hard: Tensor, soft: Tensor) -> Tensor:
        return hard.to(soft.dtype, copy=True)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return None, gradients[0]


def straight_through(hard: Tensor, soft: Tensor) -> Tensor:
    """Return the hard values, with the gradient of the soft ones.

    The values are exactly those of ``hard``; ``hard + soft - soft.detach()`` would round.

    Args:
        hard: what the forward sees, such as 0 and 1; of any dtype.
        soft: of the same shape: what gets the gradient.

    Returns:
        A tensor of the dtype of ``soft``.

    Raises:
        ValueError: if they have different shapes.

    Example:
        >>> soft = torch.tensor([0.2, 0.7], requires_grad=True)
        >>> hard = straight_through(soft > 0.5, soft)
        >>> (hard * torch.tensor([3.0, 4.0])).sum().backward()
        >>> hard.tolist(), soft.grad.tolist()
        ([0.0, 1.0], [3.0, 4.0])
    """
    if hard.shape != soft.shape:
        raise ValueError(
            f"straight_through(): hard and soft must have one shape, found {tuple(hard.shape)} and "
            f"{tuple(soft.shape)}."
        )
    return _StraightThrough.apply(hard, soft)


@contextlib.contextmanager
def gated(gates: Mapping[UnitLayer, Gates], caller: str = "gated()") -> Iterator[set[UnitLayer]]:
    """Multiply the units of layers by gates in every forward inside the ``with`` block.

    Forward pre-hooks on the readers, and nothing else: no module is replaced, and whatever
    happens inside, the hooks are gone afterwards.

    Args:
        gates: unit layer, of :func:`torch_dimap.group_units` -> what returns its gates:
            a tensor of one factor per unit, or of one row of them for each image of the
            batch. A row serves all windows that an image is cut into.
        caller: whom an error names.

    Yields:
        The layers whose gates have been applied so far, outside of compiled code.

    Raises:
        TypeError: for keys that are no unit layers.
        ValueError: if a layer's reader is read without being called, so that no hook of
            its would run; in a forward, for gates of another shape.

    Example:
        >>> import timm, torch, torch_dimap
        >>> vit = timm.create_model("vit_tiny_patch16_224", depth=1).eval()
        >>> heads = torch_dimap.group_units(vit)["heads"][0]
        >>> image = torch.randn(1, 3, 224, 224)
        >>> with gated({heads: lambda: torch.ones(3)}):
        ...     ones = vit(image)
        >>> torch.equal(ones, vit(image))
        True
    """
    if not isinstance(gates, Mapping) or not all(isinstance(x, UnitLayer) for x in gates):
        raise TypeError(
            f"{caller}: gates must be a mapping unit layer -> what returns its gates, found "
            f"{type(gates).__name__}: see group_units(model)."
        )
    uncalled = [layer.name for layer in gates if is_never_called(layer.reader)]
    if uncalled:
        raise ValueError(
            f"{caller}: expected layers whose readers the model calls, found some that it only "
            f"reads, {name_some(uncalled)}: no hook runs there, leave these layers out."
        )
    handles = []
    applied: set[UnitLayer] = set()
    try:
        for layer, gate in gates.items():
            hook = _hook(layer, gate, applied, caller)
            handles.append(layer.reader.register_forward_pre_hook(hook))
        yield applied
    finally:
        for handle in handles:
            handle.remove()


def refuse_idle(layers: Iterable[UnitLayer], applied: set[UnitLayer], caller: str) -> None:
    """Refuse layers that a forward did not gate, while it gated others."""
    idle = [layer.name for layer in layers if layer not in applied]
    if applied and idle:
        raise RuntimeError(
            f"{caller}: expected a forward to gate all layers, found that it passes by the readers "
            f"of {name_some(idle)}: leave these layers out."
        )


def refuse_diverged(logits: Iterable[Tensor], caller: str) -> None:
    """Refuse to decide by NaN, which every comparison takes for a unit that goes."""
    found = [x.detach().isnan().any() for x in logits]
    if found and bool(torch.stack(found).any()):  # told once: a GPU is waited for each time
        raise ValueError(
            f"{caller}: what was learned must be numbers to decide by, found NaN: the training has "
            "diverged; go on from an earlier state, with a lower learning rate."
        )


def _hook(
    layer: UnitLayer, gate: Gates, applied: set[UnitLayer], caller: str
) -> Callable[[nn.Module, Any], Any]:
    def multiply(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        if not torch.compiler.is_compiling():
            applied.add(layer)
        return (apply_gates(layer, inputs[0], gate(), caller), *inputs[1:])

    return multiply


def apply_gates(layer: UnitLayer, x: Tensor, gates: Tensor, caller: str) -> Tensor:
    """Multiply the input of a layer's reader by gates, (units,) or (images, units)."""
    if gates.dim() not in (1, 2) or gates.shape[-1] != layer.units:
        raise ValueError(
            f"{caller}: gates of {layer.name} must have the shape ({layer.units},) or (images, "
            f"{layer.units}), found {tuple(gates.shape)}."
        )
    spread = layer.read.along(gates).to(x.dtype)
    shape = [1] * x.dim()
    shape[layer.channels] = -1
    if spread.dim() == 2:
        windows, rest = divmod(len(x), len(spread))
        if rest:
            raise ValueError(
                f"{caller}: gates must be for the images of the batch, found {len(spread)} rows "
                f"in front of {layer.name}, which takes in {len(x)} images or windows: pass one "
                "row for each image."
            )
        spread = spread.repeat_interleave(windows, dim=0)
        shape[0] = len(spread)
    return x * spread.view(shape)


def layers_of(model: nn.Module, units: Units, caller: str) -> tuple[UnitLayer, ...]:
    """List the unit layers, once they are known to be sound and of the model."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{caller}: model must be an nn.Module, found {type(model).__name__}.")
    refuse_sharded_model(model, caller)  # gates that each process trains for itself come apart
    groups = check_units(units, caller)
    layers = tuple(layer for members in groups.values() for layer in members)
    own = set(model.modules())
    foreign = [layer.name for layer in layers if layer.module not in own]
    if foreign:
        raise ValueError(
            f"{caller}: units must be those of the model, found {name_some(foreign)} of another: "
            "call group_units(model)."
        )
    return layers

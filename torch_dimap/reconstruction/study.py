"""How a model's forward uses its layers, found out once, before any batch is run for a refit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from torch_dimap.masking import Layer, hold_masks, untouched
from torch_dimap.reconstruction.batches import Call, to_device
from torch_dimap.reconstruction.gathering import gather_in_forwards
from torch_dimap.reconstruction.steps import Swap, Trace, note_last_users, trace
from torch_dimap.reconstruction.streams import steps_hold
from torch_dimap.reconstruction.watching import bias_of
from torch_dimap.sharding import Processes, whole_of
from torch_dimap.text import name_some, warn


@contextmanager
def study(
    model: nn.Module,
    calls: list[Call],
    layers: list[Layer],
    weights: Sequence[list[Swap]],
    caller: str,
    listed: bool = True,
    processes: Processes | None = None,
) -> Iterator[tuple[Trace, Callable[[int], Any]]]:
    """Make a model ready to be run on batches, and find out how it uses some layers.

    ``weights`` are those of the streams to come. Where no user has ``listed`` the layers, those
    that are no matrices are left alone. ``processes`` are those that hold parts of the model,
    if there are several. Gives the trace, and what runs the model on the batch of a number.
    """
    if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
        raise ValueError(
            f"{caller}: model must be one that nothing spreads over devices, found "
            f"{type(model).__name__}: give model.module, and the same images in every process."
        )
    device = layers[0].parameter.device

    def call(batch: int) -> Any:
        args, kwargs = to_device(calls[batch], device)
        # The same random numbers for every forward, and none of them taken from the caller's.
        with torch.random.fork_rng(cuda):
            return model(*args, **kwargs)

    cuda = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with untouched(model), _plain_numbers(device):
        hold_masks(model)
        if processes is not None:
            gather_in_forwards(model)
        run = partial(call, 0)
        found = trace(model, run, layers)
        if not listed and found.unclear:
            layers = _matrices_of(layers, found, caller)
            found = trace(model, run, layers)
        _check_uses(layers, found, caller)
        _leave_shared_biases(model, layers, found)
        note_last_users(found.steps, run)
        if len(found.steps) > 1:
            hold = steps_hold(call, len(calls), found.steps, weights)
            if not (hold if processes is None else all(processes.gather_object(hold))):
                found.steps[:] = [found.whole]
        yield found, call


def _matrices_of(layers: list[Layer], found: Trace, caller: str) -> list[Layer]:
    """Return the layers that are used as matrices, if there are any."""
    rest = [layer for layer in layers if layer.label not in found.unclear]
    # What sees each channel by itself lacks nothing where others are gone whole.
    masks = [(x.label, x.mask) for x in layers if x not in rest]
    cut = [label for label, mask in masks if mask is not None and not _whole_rows(whole_of(mask))]
    if rest and cut:
        warn(
            f"{caller}: {name_some(sorted(cut))} left alone: the forward does not multiply with "
            "them as a linear layer or a 1x1 convolution does."
        )
    return rest or layers


def _check_uses(layers: list[Layer], found: Trace, caller: str) -> None:
    """Raise unless a forward uses the layers, and in a way that a refit can follow."""
    if found.unclear:
        raise ValueError(
            f"{caller}: layers must be multiplied as a linear layer or a 1x1 convolution is, "
            "in the same rows each time, found another product with "
            f"{name_some(sorted(found.unclear))}: leave them out, as "
            "groups=group_parameters(model) does."
        )
    unused = [layer.label for layer in layers if layer.label not in found.uses]
    if len(unused) == len(layers):
        raise ValueError(
            f"{caller}: the forward must use the layers, found none of them in use: "
            "give batches that go through them."
        )
    if unused:
        warn(f"{caller}: {name_some(unused)} left alone: the forward multiplies nothing with them.")


def _leave_shared_biases(model: nn.Module, layers: list[Layer], found: Trace) -> None:
    """Count biases that other layers hold, too, as not added: they stay."""
    held = holders(model)
    for layer in layers:
        bias = bias_of(layer)
        if bias and held[bias.parameter] > 1:
            found.biased.discard(layer.label)


def _whole_rows(mask: Tensor) -> bool:
    """Say whether each row of a mask stays or goes as a whole."""
    flat = mask.flatten(1) != 0
    return bool((flat == flat[:, :1]).all())


def holders(model: nn.Module) -> Counter[nn.Parameter]:
    """Count by how many modules, or under how many of their names, each parameter is held."""
    held = (parameter for module in model.modules() for parameter in module._parameters.values())
    return Counter(parameter for parameter in held if parameter is not None)


@contextmanager
def _plain_numbers(device: torch.device) -> Iterator[None]:
    """Keep autocast, and products of less than float32, out of sums."""
    try:
        settings = {torch.set_float32_matmul_precision: torch.get_float32_matmul_precision()}
        plain = "highest"
    except RuntimeError:  # the program uses what follows these two, and the two must not be mixed
        backends: Any = torch.backends  # whose types torch does not tell
        matmuls = backends.cuda.matmul, backends.mkldnn.matmul
        settings = {partial(setattr, x, "fp32_precision"): x.fp32_precision for x in matmuls}
        plain = "ieee"
    try:
        for change in settings:
            change(plain)
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        for change, before in settings.items():
            change(before)

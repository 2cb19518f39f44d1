"""The kept weights of a masked model refitted on a few unlabelled images."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from torch_dimap.masking import (
    Layer,
    Parameters,
    find_layers,
    hold_masks,
    pruned_tensors,
    pruning_methods,
    untouched,
)
from torch_dimap.reconstruction.batches import read_batches, to_device
from torch_dimap.reconstruction.refitting import Misfit, Problem, gather
from torch_dimap.reconstruction.steps import Trace, note_last_users, trace
from torch_dimap.reconstruction.streams import Stream, dense_weights, other_value
from torch_dimap.text import name_some, warn

CALLER = "reconstruct()"


def reconstruct(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    sequential: bool = True,
    damping: float = 0.01,
    groups: Parameters | None = None,
    progress: bool = False,
) -> dict[str, Misfit]:
    """Refit."""
    layers = _masked_layers(model, groups)
    _check_damping(damping)
    calls = read_batches(model, batches, CALLER)
    device = layers[0].parameter.device

    def call(batch: int) -> Any:
        args, kwargs = to_device(calls[batch], device)
        return model(*args, **kwargs)

    misfits: dict[str, Misfit] = {}
    values: list[tuple[nn.Module, str, Tensor]] = []
    with torch.inference_mode(False), untouched(model), _plain_numbers(device):
        hold_masks(model)
        found = study(model, lambda: call(0), layers, CALLER)
        pruned = {(x.module, x.name): x for x in pruned_tensors(model, CALLER)}
        dense = Stream(call, len(calls), found.steps, dense_weights(list(pruned.values())))
        masked = Stream(call, len(calls), found.steps, []) if sequential else None
        streams = [stream for stream in (dense, masked) if stream]
        bar = tqdm(total=sum(map(len, found.uses)), unit=" layers", disable=not progress)
        with bar:
            for step in found.steps:
                levels = step.levels if sequential else [sum(step.levels, [])]
                for level in filter(None, levels):
                    problems = [Problem(layer, layer.label in found.biased) for layer in level]
                    gather(dense, masked, problems, found)
                    for problem in problems:
                        weight, bias, misfits[problem.layer.label] = problem.solve(damping, CALLER)
                        problem.sums.clear()
                        values.append((problem.layer.module, problem.layer.name, weight))
                        if problem.bias and bias is not None:
                            values.append((problem.layer.module, problem.bias, bias))
                        bar.update()
                    if masked:
                        masked.weights[:] = [other_value(*value) for value in values]
                if step is not found.steps[-1]:
                    for stream in streams:
                        stream.advance()
    _commit(values)
    return misfits


def study(
    model: nn.Module, run: Callable[[], Any], layers: list[Layer], caller: str
) -> Trace:
    """Find out by two forwards how a model uses some layers."""
    found = trace(model, run, layers)
    if found.unclear:
        raise ValueError(
            f"{caller}: layers must be multiplied as a linear layer or a 1x1 convolution is, "
            f"found another product with {name_some(sorted(found.unclear))}: leave them out."
        )
    unused = [layer.label for layer in layers if layer.label not in found.uses]
    if len(unused) == len(layers):
        raise ValueError(
            f"{caller}: the forward must use the masked layers, found none of them in use: "
            "give batches that go through them."
        )
    if unused:
        warn(f"{caller}: {name_some(unused)} stay as they are: the forward does not use them.")
    note_last_users(found.steps, run)
    return found


def _masked_layers(model: nn.Module, groups: Parameters | None) -> list[Layer]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{CALLER}: model must be an nn.Module, found {type(model).__name__}.")
    if groups is not None:
        listed = [x for layers in find_layers(groups, CALLER, model).values() for x in layers]
    else:
        listed = list({(x.module, x.name): x for x in pruned_tensors(model, CALLER)}.values())
    layers = [x for x in listed if x.mask is not None and x.parameter.dim() > 1]
    if not layers:
        raise ValueError(
            f"{CALLER}: model must hold masked weights, found none: prune it first, and call "
            "remove_all afterwards."
        )
    return layers


def _check_damping(damping: Any) -> None:
    if isinstance(damping, bool) or not isinstance(damping, numbers.Real):
        raise TypeError(f"{CALLER}: damping must be a number, found {type(damping).__name__}.")
    if not 0 < damping < math.inf:
        raise ValueError(
            f"{CALLER}: damping must be above 0, found {damping}: without it, weights that the "
            "images leave undetermined could become anything."
        )


@contextmanager
def _plain_numbers(device: torch.device) -> Iterator[None]:
    """Keep autocast, and products of less than float32, out of sums."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)


@torch.no_grad()
def _commit(values: list[tuple[nn.Module, str, Tensor]]) -> None:
    """Write new values into the parameters: into all, or into none."""
    written = []
    for module, name, value in values:
        parameter = other_value(module, name, value)
        written.append((module._parameters[parameter[1]], value))
    before = [(parameter, parameter.detach().clone()) for parameter, _ in written]
    try:
        for parameter, value in written:
            parameter.copy_(value)
    except BaseException:
        for parameter, value in before:
            parameter.copy_(value)
        raise
    for module in {module: None for module, _, _ in values}:
        for method in pruning_methods(module):
            setattr(module, method._tensor_name, method.apply_mask(module))

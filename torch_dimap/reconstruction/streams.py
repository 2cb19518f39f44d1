"""Batches on their way through a model, from step to step, with weights of a stream's own."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from torch_dimap.masking import Layer
from torch_dimap.reconstruction.steps import (
    Step,
    Swap,
    map_tensors,
    opaque,
    swapped,
    tensors,
)
from torch_dimap.reconstruction.watching import Use, Watch


class _Enough(BaseException):
    """Ends a forward that has shown what it was run for; no error, so no code catches it."""


class Stream:
    """A model's forward on some batches, as far as it has come.

    Args:
        call: runs the model on the batch of a number.
        batches: how many there are.
        steps: of the forward.
        weights: what to put into the modules while this stream's forward runs; it may grow.
    """

    def __init__(
        self, call: Callable[[int], Any], batches: int, steps: Sequence[Step], weights: list[Swap]
    ) -> None:
        self.call, self.batches, self.steps, self.weights = call, batches, steps, weights
        self.given: list[list[Any]] = []  # for every finished step, what it gave for each batch

    def watch(
        self, batch: int, layers: Sequence[Layer], uses: int, seen: Callable[[Use], None]
    ) -> None:
        """Run the step in work on a batch until layers were used so many times."""
        left = uses

        def count(use: Use) -> None:
            nonlocal left
            seen(use)
            left -= 1
            if not left:
                raise _Enough

        with Watch(layers, count):
            self._run(batch, [])
        if left:
            raise RuntimeError(_unlike(layers[0].label, batch, "less"))

    def advance(self, uses: Mapping[str, int] | None = None) -> None:
        """Run the step in work on all batches, and let go of what no later step uses.

        Args:
            uses: how often each layer is to be used, by its label; more raises a RuntimeError.
        """
        i = len(self.given)
        layers = sum(self.steps[i].levels, []) if uses else []
        step = self.steps[i].module
        outputs = []
        forward = step.forward

        def keep(*args: Any, **kwargs: Any) -> Any:
            outputs.append(forward(*args, **kwargs))
            raise _Enough

        for batch in range(self.batches):
            counted: Counter[str] = Counter()
            seen = partial(_count, counted)
            with Watch(layers, seen) if uses else nullcontext():
                self._run(batch, [(vars(step), "forward", keep)])
            if len(outputs) == batch:
                raise RuntimeError(
                    f"the model must use its {type(step).__name__} with all batches, found batch "
                    f"{batch} to leave it out: give batches of one kind."
                )
            for label, often in counted.items():
                if uses and often > uses[label]:
                    raise RuntimeError(_unlike(label, batch, "more"))
            for k in range(i):
                if self.steps[k].last_user <= i:
                    self.given[k][batch] = map_tensors(self.given[k][batch], _placeholder)
        self.given.append(outputs)

    def _run(self, batch: int, forwards: list[Swap]) -> None:
        """Run the model on a batch, the finished steps giving what they gave."""
        for step, given in zip(self.steps, self.given):
            forwards.append((vars(step.module), "forward", _giving(given[batch])))
        with swapped([*self.weights, *forwards]):
            try:
                self.call(batch)
            except _Enough:
                pass


def _count(counted: Counter[str], use: Use) -> None:
    counted[use.layer.label] += 1


def _unlike(label: str, batch: int, how: str) -> str:
    return (
        f"{label} must be used alike in all batches, found batch {batch} to use it {how} often "
        "than the first: give batches of one kind."
    )


def steps_hold(
    call: Callable[[int], Any], batches: int, steps: Sequence[Step], weights: Sequence[list[Swap]]
) -> bool:
    """Say whether steps that run one by one give what they give in a whole forward.

    They do not if a step does more than give an output: keeps something for later ones,
    changes its inputs in place, or draws random numbers; and what an output of a class of its
    own holds cannot be copied for each run. So the first and the last batch are
    taken through the steps with each of the weights in turn, which spoils what steps keep.
    """
    whole: dict[int, list[Tensor]] = {}
    hidden, alike = list[bool](), list[bool]()

    def noting(i: int, forward: Callable) -> Callable:
        def noted(*args: Any, **kwargs: Any) -> Any:
            output = forward(*args, **kwargs)
            whole[i] = _samples(output)
            hidden.append(opaque(output))
            return output

        return noted

    two = min(batches, 2)
    streams = [Stream(lambda batch: call(-batch), two, steps, own) for own in weights]
    streams[0]._run(
        0, [(vars(s.module), "forward", noting(i, s.module.forward)) for i, s in enumerate(steps)]
    )
    for i in range(len(steps)):
        if any(hidden):
            return False
        try:
            for stream in streams:
                stream.advance()
            given = _samples(streams[0].given[i][0])
        except Exception:  # which a whole forward, as that before, did not raise
            return False
        alike.append(len(given) == len(whole[i]) and all(map(_alike, given, whole[i])))
    return all(alike)  # known at the end only, so that all processes make the same forwards


def _samples(output: Any) -> list[Tensor]:
    """Take some entries of each tensor, enough to tell what it was."""
    flat = [tensor.detach().flatten() for tensor in tensors(output)]
    return [tensor[:: 1 + len(tensor) // 2**16].clone() for tensor in flat]


def _alike(a: Tensor, b: Tensor) -> bool:
    """Say whether two tensors are equal up to rounding."""
    if a.shape != b.shape or not a.is_floating_point():
        return torch.equal(a, b)
    precision = 0.1 * torch.finfo(a.dtype).eps ** 0.5
    a, b = a.double().nan_to_num(), b.double().nan_to_num()
    return bool((a - b).norm() <= precision * b.norm())


def _giving(output: Any) -> Callable:
    """Make a forward that gives a copy of what is kept: the model may work on it in place."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        return map_tensors(output, lambda t: t if 0 in t.stride() else t.clone())

    return forward


def _placeholder(tensor: Tensor) -> Tensor:
    """Stand in for a tensor that nothing is made of any more; if it were, there would be NaN."""
    if not tensor.is_floating_point():
        return tensor
    return tensor.new_full((), math.nan).expand(tensor.shape)


def dense_weights(layers: Sequence[Layer]) -> list[Swap]:
    """Let every mask keep everything, so that the model is the dense one."""
    swaps: list[Swap] = []
    for layer in layers:
        parameter = layer.parameter
        ones = torch.ones((), dtype=torch.bool, device=parameter.device).expand(parameter.shape)
        swaps.append((layer.module._buffers, f"{layer.name}_mask", ones))
    return swaps


def other_values(values: Iterable[tuple[Layer, Tensor]]) -> list[Swap]:
    """Put other values in the place of parameters, behind their masks if they have one."""
    return [
        (
            layer.module._parameters,
            layer.name if layer.mask is None else f"{layer.name}_orig",
            nn.Parameter(value, requires_grad=False),
        )
        for layer, value in values
    ]

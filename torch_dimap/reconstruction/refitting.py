"""One layer refitted: from what it sees and what it should give to its new kept weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from torch_dimap.masking import Layer
from torch_dimap.reconstruction.moments import Moments
from torch_dimap.reconstruction.solving import solve_masked
from torch_dimap.reconstruction.steps import Trace
from torch_dimap.reconstruction.streams import Stream
from torch_dimap.reconstruction.watching import Use, bias_of

DENSE_SHARE = 1.0


class Misfit(NamedTuple):
    """How far a layer's outputs lie from those wanted, as a part of their norm."""

    before: float
    after: float


class Problem:
    """A layer as the solver sees it, and what the batches tell of it.

    Attributes:
        layer: the layer.
        bias: the name of its bias, if that is refitted too.
        weight: its dense weights, and the bias in a last column, float32.
        keep: which of them may change, boolean.
        sums: for all rows, or for the rows that are multiplied apart from others.
    """

    def __init__(self, layer: Layer, biased: bool) -> None:
        self.layer = layer
        self.bias = bias_of(layer) if biased else None
        mask = layer.mask
        self.weight = layer.parameter.detach().flatten(1).float()
        self.keep = torch.ones_like(self.weight, dtype=torch.bool)
        if mask is not None:
            self.keep = mask.flatten(1) != 0
        if self.bias:
            bias = Layer(f"{layer.label}'s bias", layer.module, self.bias)
            kept = torch.ones_like(bias.parameter) if bias.mask is None else bias.mask
            column = bias.parameter.detach().float()[:, None]
            self.weight = torch.cat([self.weight, column], 1)
            self.keep = torch.cat([self.keep, kept[:, None] != 0], 1)
        self.masked = self.weight * self.keep
        self.sums: dict[tuple[int, int], Moments] = {}

    def add(self, use: Use, wanted: Tensor) -> None:
        rows = slice(*use.rows)
        weight, masked = self.weight[rows], self.masked[rows]
        sums = self.sums.setdefault(use.rows, Moments(*weight.shape, device=weight.device))
        sums.add(use.inputs, wanted, weight, masked)

    def solve(self, damping: float, caller: str) -> tuple[Tensor, Tensor | None, Misfit]:
        """Return the parameter's new values, those of its bias, and what that gains."""
        parameter = self.layer.parameter
        columns = parameter[0].numel()
        refit = self.weight.clone()
        before = after = target = 0.0
        for (first, last), sums in self.sums.items():
            weight, keep, masked = (x[first:last] for x in (self.weight, self.keep, self.masked))
            if not sums.inputs.isfinite().all() or not sums.error.isfinite():
                raise ValueError(
                    f"{caller}: the inputs of {self.layer.label} must be finite, found NaN or "
                    "infinity: leave out the batch that makes them, or use a wider dtype."
                )
            ridge = torch.zeros_like(sums.inputs[0])
            ridge[:columns] = damping * sums.inputs.diagonal()[:columns].mean()
            change = solve_masked(sums.inputs, sums.errors, keep, ridge, float(sums.error))
            new = torch.where(keep, masked + change, weight.double()).to(parameter.dtype)
            refit[first:last] = new.float()
            change = torch.where(keep, new.double() - masked, 0.0)
            gain = (change * (2 * sums.errors - change @ sums.inputs)).sum()
            before += float(sums.error)
            after += float(sums.error - gain)
            target += float(sums.target)
        scale = target or 1.0
        misfit = Misfit((before / scale) ** 0.5, (max(after, 0.0) / scale) ** 0.5)
        values = refit[:, :columns].reshape(parameter.shape).to(parameter.dtype)
        bias = refit[:, columns].to(parameter.dtype) if self.bias else None
        return values, bias, misfit


def gather(
    dense: Stream, masked: Stream | None, problems: Sequence[Problem], found: Trace
) -> None:
    """Take in all batches: what layers see, and what they should give for it."""
    layers = [problem.layer for problem in problems]
    by_label = {problem.layer.label: problem for problem in problems}
    uses = sum(found.uses[layer.label] for layer in layers)
    for batch in range(dense.batches):
        if masked is None:
            dense.watch(batch, layers, uses, lambda use: by_label[use.layer.label].add(use, use.inputs))
            continue
        wanted: list[Use] = []
        dense.watch(batch, layers, uses, wanted.append)

        def pair(use: Use) -> None:
            aim = wanted.pop(0).inputs
            if DENSE_SHARE!=1.0: aim=torch.lerp(use.inputs.float(), aim.float(), DENSE_SHARE)
            by_label[use.layer.label].add(use, aim)

        masked.watch(batch, layers, uses, pair)

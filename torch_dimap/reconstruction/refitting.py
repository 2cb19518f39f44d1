"""One layer refitted: from what it sees, and what it should give, to new kept weights."""

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
from torch_dimap.sharding import Processes, laid_out, whole_of

NOISE = 1e-6  # of sums of float32 products, as a part of their norm; less damping would fit it


class Misfit(NamedTuple):
    """How far a layer's outputs lie from those wanted: |wanted - given| / |wanted|."""

    before: float
    after: float


class Refit:
    """A layer to refit, and what the batches tell of it.

    Attributes:
        layer: its weight.
        bias: its bias, if that is refitted too.
        parts: both, or the layer alone.
        dense: the dense weights, with the bias in a last column, float32.
        keep: which of them may change, boolean.
        sums: of the rows from one to another that are multiplied together: usually all.
    """

    def __init__(self, layer: Layer, biased: bool) -> None:
        self.layer, self.bias = layer, bias_of(layer) if biased else None
        self.parts = [layer, self.bias] if self.bias else [layer]
        self.dense = _columns([x.parameter for x in self.parts]).float()
        masks = [torch.ones_like(x.parameter) if x.mask is None else x.mask for x in self.parts]
        self.keep = _columns(masks) != 0
        self.masked = self.dense * self.keep
        self.sums: dict[tuple[int, int], Moments] = {}

    def add(self, use: Use, wanted: Tensor) -> None:
        """Take in what the layer sees, and what the dense weights make the targets of."""
        rows = slice(*use.rows)
        if use.rows not in self.sums:
            self.sums[use.rows] = Moments(self.dense[rows])
        self.sums[use.rows].add(use.inputs, wanted, self.dense[rows], self.masked[rows])

    def solve(
        self, damping: float, caller: str, processes: Processes | None
    ) -> tuple[list[tuple[Layer, Tensor]], Misfit]:
        """Return the new values of the parameters, rounded to their dtype, and the gain.

        Where there are several processes, the batches of all of them count.
        """
        parameter = self.layer.parameter
        columns = parameter.shape[1:].numel()
        values = _columns([x.parameter for x in self.parts]).double()
        before = after = wanted = 0.0
        for (first, last), sums in self.sums.items():
            sums.join(processes)
            sums.check(f"{caller}: the inputs of {self.layer.label}")
            keep, old = self.keep[first:last], values[first:last]
            # Where there are more inputs than tokens, most of a fit would be chance.
            price = damping * (1 + columns / sums.tokens) if sums.tokens else damping
            ridge = sums.inputs.new_zeros(len(sums.inputs))  # none on the bias
            ridge[:columns] = price * sums.inputs.diagonal()[:columns].mean()
            ridge[:columns].clamp_(min=NOISE * sums.inputs.norm())
            change = solve_masked(sums.inputs, sums.errors, keep, ridge, float(sums.error))
            new = torch.where(keep, (old + change).to(parameter.dtype).double(), old)
            if processes is not None:  # replicas must not differ in their last bits
                processes.hand_out(new)
            change = new - old  # as rounded
            values[first:last] = new
            gain = (change * (2 * sums.errors - change @ sums.inputs)).sum()
            before += float(sums.error)
            after += max(0.0, float(sums.error - gain))
            wanted += float(sums.target)
        scale = wanted or 1.0
        misfit = Misfit((before / scale) ** 0.5, (after / scale) ** 0.5)
        split = values[:, :columns].reshape(parameter.shape), values[:, columns:].flatten()
        refitted = [(part, laid_out(new.to(part.parameter.dtype), part.parameter))
                    for part, new in zip(self.parts, split)]  # fmt: skip
        return refitted, misfit


def _columns(tensors: Sequence[Tensor]) -> Tensor:
    """Put a weight and its bias side by side, with all of their entries, a row for each output."""
    wholes = [whole_of(tensor.detach()) for tensor in tensors]
    return torch.cat([whole.reshape(len(whole), -1) for whole in wholes], 1)


def gather(refits: Sequence[Refit], dense: Stream, masked: Stream | None, found: Trace) -> None:
    """Run all batches through the step in work, and take in what some layers see.

    Args:
        refits: the layers, which see their inputs at the same time where there are two streams.
        dense: gives the inputs that make the targets.
        masked: gives the inputs to reach them from; None: those of the dense stream too.
        found: how the forward uses the layers.
    """
    by_label = {refit.layer.label: refit for refit in refits}
    layers = [refit.layer for refit in refits]
    uses = sum(found.uses[label] for label in by_label)
    for batch in range(dense.batches):
        wanted: list[Use] = []

        def alone(use: Use) -> None:
            by_label[use.layer.label].add(use, use.inputs)

        def keep(use: Use) -> None:
            again = uses > len(layers)  # by then the model may have changed these in place
            wanted.append(use._replace(inputs=use.inputs.clone()) if again else use)

        def paired(use: Use) -> None:
            aim = wanted.pop(0).inputs
            if aim.shape != use.inputs.shape:
                raise RuntimeError(
                    f"{use.layer.label} must see as many tokens in the pruned model as in the "
                    f"dense one, found {len(use.inputs)} and {len(aim)}: where a model chooses "
                    "tokens by what they hold, give sequential=False."
                )
            by_label[use.layer.label].add(use, aim)

        if masked is None:
            dense.watch(batch, layers, uses, alone)
        else:
            dense.watch(batch, layers, uses, keep)
            masked.watch(batch, layers, uses, paired)

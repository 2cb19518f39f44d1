"""Sums over all tokens of all batches, which are all that a refit needs to know of them."""

from __future__ import annotations

import torch
from torch import Tensor

from torch_dimap.sharding import Processes

_CHUNK = 2**24  # entries of the inputs that are multiplied at once


class Moments:
    """Sums for rows of one layer: float32 products of some tokens, added up in float64.

    Attributes:
        inputs: X^T X, for the inputs X of the layer, d x d; with a bias, which is a weight of
            an input that is always one, d is one more than the layer's inputs.
        errors: E^T X, for what the outputs lack to their targets, r x d.
        error: |E|^2.
        target: the targets' sum of squares.
        tokens: how many there were.
    """

    def __init__(self, weight: Tensor) -> None:
        rows, columns = weight.shape
        self.inputs = weight.new_zeros(columns, columns, dtype=torch.float64)
        self.errors = weight.new_zeros(rows, columns, dtype=torch.float64)
        self.error = weight.new_zeros((), dtype=torch.float64)
        self.target = weight.new_zeros((), dtype=torch.float64)
        self.tokens = 0

    def add(self, inputs: Tensor, wanted: Tensor, weight: Tensor, kept: Tensor) -> None:
        """Take in some tokens.

        Args:
            inputs: what the layer sees, n x d without the ones for a bias.
            wanted: what the dense ``weight`` turns into the targets, n x d; it may be
                ``inputs`` itself.
            weight: the dense weights, and the bias in a last column, float32, r x d.
            kept: the same, zeros where they are masked.
        """
        size = max(1, _CHUNK // max(weight.shape))
        for x, z in zip(inputs.split(size), wanted.split(size)):
            x = _with_ones(x, weight)
            z = x if wanted is inputs else _with_ones(z, weight)
            target = z @ weight.t()
            error = target - x @ kept.t()
            self.inputs += x.t() @ x
            self.errors += error.t() @ x
            self.error += error.square().sum(dtype=torch.float64)
            self.target += target.square().sum(dtype=torch.float64)
        self.tokens += len(inputs)

    def join(self, processes: Processes | None) -> None:
        """Add up what all processes have taken in, where there are several."""
        if processes is not None:
            tokens = self.target.new_tensor(self.tokens)
            for each in (self.inputs, self.errors, self.error, self.target, tokens):
                processes.add_up(each)
            self.tokens = int(tokens)

    def check(self, what: str) -> None:
        """Raise if there was NaN or infinity among what was added up."""
        if not (self.inputs.isfinite().all() and self.errors.isfinite().all()):
            raise ValueError(
                f"{what} must be finite, found NaN or infinity: leave out the batches that lead "
                "to them, or use a wider dtype."
            )


def _with_ones(x: Tensor, weight: Tensor) -> Tensor:
    x = x.float()
    return x if x.shape[1] == weight.shape[1] else torch.cat([x, x.new_ones(len(x), 1)], 1)

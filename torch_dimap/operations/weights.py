"""A convolution made of an attention's own weights: its heads mixed, tap by tap.

Source: He et al., "Pruning Self-attentions into Convolutional Layers in Single Path", TPAMI
2024, arXiv 2111.11802, as its authors' code has it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Bottleneck(NamedTuple):
    """The weights of a bottleneck convolution, from ``dim`` channels to ``width`` and back."""

    kernel: Tensor  # (width, dim, size, size)
    bias: Tensor | None  # (width,)
    projection: Tensor  # (dim, width)


def head_shares(logits: Tensor, temperature: float) -> Tensor:
    """Return how much each head counts in each tap: a softmax over heads.

    Args:
        logits: (heads, taps).
        temperature: what the logits are divided by. The lower, the sooner small changes of
            the logits pick out single heads.
    """
    return torch.softmax(logits / temperature, dim=0)


def mix_heads(
    value: Tensor, value_bias: Tensor | None, projection: Tensor, shares: Tensor
) -> Bottleneck:
    """Mix an attention's value and output projections into one convolution.

    Each tap's kernel is the mean of the heads' value projections, weighted by the tap's
    shares, and the projection after it is the sum of such means of the heads' output
    projections over all taps.

    Args:
        value: (heads * width, dim), head after head.
        value_bias: (heads * width,), or None.
        projection: (dim, heads * width).
        shares: (heads, taps), of one tap or nine; taps in the order of a kernel's rows.
    """
    heads, taps = shares.shape
    size = 3 if taps == 9 else 1
    kernel = torch.einsum("ht,hwd->wdt", shares, value.unflatten(0, (heads, -1)))
    bias = None
    if value_bias is not None:
        bias = torch.einsum("ht,hw->w", shares, value_bias.unflatten(0, (heads, -1)))
    mixed = torch.einsum("ht,dhw->dw", shares, projection.unflatten(1, (heads, -1)))
    return Bottleneck(kernel.unflatten(-1, (size, size)), bias, mixed)


def convolve(x: Tensor, weights: Bottleneck, norm: nn.Module, bias: Tensor | None) -> Tensor:
    """Convolve a map, normalise, rectify, and project back.

    Args:
        x: (batch, height, width, dim).
        weights: as :func:`mix_heads` makes them.
        norm: a batch norm of the bottleneck's channels.
        bias: of the projection.
    """
    padding = weights.kernel.shape[-1] // 2
    z = F.conv2d(x.permute(0, 3, 1, 2), weights.kernel, weights.bias, padding=padding)
    z = F.relu(norm(z)).permute(0, 2, 3, 1)
    return F.linear(z, weights.projection, bias)

"""One attention, two convolutions and nothing, as nested choices with gates that learn.

Source: He et al., "Pruning Self-attentions into Convolutional Layers in Single Path", TPAMI
2024, arXiv 2111.11802, as its authors' code has it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from torch_dimap.learning.gates import straight_through
from torch_dimap.learning.single_path_costs import NESTED
from torch_dimap.operations import (
    TAPS,
    SharedConvolution,
    Site,
    convolve,
    head_shares,
    mix_heads,
    on_map,
    refuse_mask,
)


def sample_gates(logits: Tensor) -> Tensor:
    """Draw gates of 0 or 1: binary-concrete at temperature 1, straight-through."""
    uniform = torch.rand_like(logits, dtype=torch.float32).clamp(1e-6, 1 - 1e-6)
    noisy = logits + uniform.logit()
    return straight_through(noisy > 0, noisy.sigmoid())


def decided_gates(logits: Tensor) -> Tensor:
    """Return what the logits decide, with the gradient that the cost gives them.

    A gate is open where its probability is above one half. The gradient is that of
    ``sigmoid(p - 0.5)``, where it is the probability that enters.
    """
    return straight_through(logits > 0, (logits.sigmoid() - 0.5).sigmoid())


def nested(gates: Tensor) -> Tensor:
    """Open a gate only where all before it are open."""
    return gates.cumprod(0)


def damped(gates: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Keep the task's gradient from gates that a dearer open one makes idle."""
    conv1, conv3, attention = gates.unbind(0)
    return (
        torch.where(conv3 > 0, conv1.detach(), conv1),
        torch.where(attention > 0, conv3.detach(), conv3),
        attention,
    )


class SinglePathAttention(nn.Module):
    """An attention that can be a convolution or nothing, as its gates have it.

    Its three gates: at least a 1x1 convolution, at least a 3x3 one, attention.
    While training, all three branches are computed and each forward draws its gates; in
    evaluation only what the gates have decided runs. With all gates open the outputs are
    the attention's own.
    """

    def __init__(self, site: Site, temperature: float, initial: float) -> None:
        super().__init__()
        weight = site.attention.proj.weight
        factory: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype}
        self.attention = site.attention
        self.logits = nn.Parameter(torch.ones(site.heads, TAPS["conv3"], **factory))
        self.norms = nn.ModuleDict({name: nn.BatchNorm2d(site.width, **factory) for name in TAPS})
        self.gate_logits = nn.Parameter(torch.full((3,), initial, device=weight.device))
        self.grid, self.prefix_tokens = site.grid, site.prefix_tokens
        self.in_windows = site.window is not None
        self.temperature = temperature
        self.train(site.attention.training)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Attend, convolve or skip; inside the windows of a Swin, attend."""
        if self.in_windows:
            return self.attention(x, *args, **kwargs)
        refuse_mask(*args, **kwargs)
        return self.choose(x, self.attention)

    def choose(self, x: Tensor, attend: Callable[[Tensor], Tensor]) -> Tensor:
        """Mix the branches of tokens, or of a map, by the gates."""
        if not self.training:
            return self._decided(x, attend)
        gates = nested(sample_gates(self.gate_logits)).to(x.dtype)
        conv1, conv3, attention = damped(gates)
        return (
            attention * attend(x)
            + conv3 * (1 - attention) * self._convolve(x, "conv3")
            + conv1 * (1 - conv3) * (1 - attention) * self._convolve(x, "conv1")
        )

    def set_window_size(self, window_size: tuple[int, int]) -> None:
        """Follow a Swin block to another size of images."""
        self.attention.set_window_size(window_size)

    def decision(self) -> str:
        """Name the operation that the gates have decided for."""
        return NESTED[int(nested(self.gate_logits.detach() > 0).sum())]

    def _decided(self, x: Tensor, attend: Callable[[Tensor], Tensor]) -> Tensor:
        operation = self.decision()
        if operation == "attention":
            return attend(x)
        return torch.zeros_like(x) if operation == "skip" else self._convolve(x, operation)

    def _convolve(self, x: Tensor, operation: str) -> Tensor:
        qkv, proj = self.attention.qkv, self.attention.proj
        rows = proj.weight.shape[1]
        bias = None if qkv.bias is None else qkv.bias[-rows:]
        shares = head_shares(self.taps(operation), self.temperature)
        weights = mix_heads(qkv.weight[-rows:], bias, proj.weight, shares)
        return on_map(
            x, self.grid, self.prefix_tokens,
            lambda y: convolve(y, weights, self.norms[operation], proj.bias),
        )  # fmt: skip

    def taps(self, operation: str) -> Tensor:
        """Return the logits of the heads' shares in the taps of a convolution."""
        return self.logits if operation == "conv3" else self.logits[:, 4:5]  # the centre

    def hand_over(self, made: SharedConvolution) -> None:
        """Give a convolution that takes this module's place what was learned here."""
        with torch.no_grad():
            made.logits.copy_(self.taps(made.operation))
        made.norm.load_state_dict(self.norms[made.operation].state_dict())


class SinglePathBlock(nn.Module):
    """A Swin block that leaves it to its attention whether windows are attended to at all."""

    attn: SinglePathAttention

    def _attn(self, x: Tensor) -> Tensor:
        return self.attn.choose(x, super()._attn)  # type: ignore[misc]

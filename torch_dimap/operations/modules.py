"""What stands in an attention's place: a convolution of its weights, a plain one, or nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torch_dimap.operations.weights import Bottleneck, convolve, head_shares, mix_heads

TAPS = {"conv1": 1, "conv3": 9}  # of a convolution's kernel, by the operation's name


def on_map(
    x: Tensor, grid: tuple[int, int], prefix_tokens: int, operate: Callable[[Tensor], Tensor]
) -> Tensor:
    """Apply an operation on maps to tokens in rows; prefix tokens are handed on as they are.

    Args:
        x: tokens (batch, prefix + height * width, dim), or a map (batch, height, width, dim).
        grid: height and width of the tokens' map.
        prefix_tokens: how many tokens, such as a class token, come before those of the map.
        operate: map -> map.

    Raises:
        ValueError: if there is another number of tokens.
    """
    if x.dim() == 4:
        return operate(x)
    prefix, patches = x[:, :prefix_tokens], x[:, prefix_tokens:]
    if patches.shape[1] != grid[0] * grid[1]:
        raise ValueError(
            f"a convolution in an attention's place needs a map: expected {grid[0]} x {grid[1]} "
            f"tokens besides {prefix_tokens} others, found {patches.shape[1]}: call the model "
            "with images of the size that it was built for, and without dropping patches."
        )
    done = operate(patches.unflatten(1, grid)).flatten(1, 2)
    return torch.cat([prefix, done], dim=1) if prefix_tokens else done


def refuse_mask(attn_mask: Tensor | None = None, is_causal: bool = False) -> None:
    """Raise if tokens are to be hidden, which only attentions can do."""
    if attn_mask is not None or is_causal:
        raise ValueError(
            "a layer whose attention was replaced takes no attention mask, found one: keep the "
            "attention in models that are called with masks."
        )


class Operation(nn.Module):
    """What operations in an attention's place have in common: how they are called."""

    operation: str  # its name in files and in choices
    number: int  # that files hold of it: how many channels, or whether the input passes

    def __init__(self, grid: tuple[int, int], prefix_tokens: int) -> None:
        super().__init__()
        self.grid = grid
        self.prefix_tokens = prefix_tokens

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        refuse_mask(attn_mask, is_causal)
        return on_map(x, self.grid, self.prefix_tokens, self.operate)

    def set_window_size(self, window_size: tuple[int, int]) -> None:
        """Follow a Swin block to another size of images: here there are no windows."""

    def operate(self, x: Tensor) -> Tensor:
        """Map a map (batch, height, width, dim) to another."""
        raise NotImplementedError


class Skip(Operation):
    """Nothing: zeros, or its input as the authors' fine-tuned models have it."""

    operation = "skip"

    def __init__(self, grid: tuple[int, int], prefix_tokens: int, passes_on: bool) -> None:
        super().__init__(grid, prefix_tokens)
        self.passes_on = passes_on
        self.number = int(passes_on)

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        return x if self.passes_on else torch.zeros_like(x)


class SharedConvolution(Operation):
    """A bottleneck convolution that mixes an attention's heads anew in every forward.

    Its ``value``, ``proj`` and ``logits`` are trained; :meth:`collapsed` gives the plain
    convolution that computes the same.
    """

    def __init__(
        self,
        value: nn.Linear,
        proj: nn.Linear,
        logits: Tensor,
        norm: nn.BatchNorm2d,
        temperature: float,
        grid: tuple[int, int],
        prefix_tokens: int,
    ) -> None:
        super().__init__(grid, prefix_tokens)
        self.operation = next(name for name, taps in TAPS.items() if taps == logits.shape[1])
        self.value = value
        self.proj = proj
        self.logits = nn.Parameter(logits)
        self.norm = norm
        self.temperature = temperature

    def weights(self) -> Bottleneck:
        shares = head_shares(self.logits, self.temperature)
        return mix_heads(self.value.weight, self.value.bias, self.proj.weight, shares)

    def operate(self, x: Tensor) -> Tensor:
        return convolve(x, self.weights(), self.norm, self.proj.bias)

    def collapsed(self) -> PlainConvolution:
        """Return the plain convolution that gives the same outputs."""
        with torch.no_grad():
            weights = self.weights()
        width, dim, size, _ = weights.kernel.shape
        plain = PlainConvolution(
            dim, width, size, self.grid, self.prefix_tokens,
            bias=weights.bias is not None, proj_bias=self.proj.bias is not None,
            device=weights.kernel.device, dtype=weights.kernel.dtype,
        )  # fmt: skip
        state = {
            "conv.weight": weights.kernel, "conv.bias": weights.bias,
            "proj.weight": weights.projection, "proj.bias": self.proj.bias,
            **{f"norm.{name}": tensor for name, tensor in self.norm.state_dict().items()},
        }  # fmt: skip
        plain.load_state_dict({name: x for name, x in state.items() if x is not None})
        return plain.train(self.training)


class PlainConvolution(Operation):
    """A bottleneck convolution: to fewer channels, batch norm, ReLU, and back."""

    def __init__(
        self,
        dim: int,
        width: int,
        size: int,
        grid: tuple[int, int],
        prefix_tokens: int,
        bias: bool = True,
        proj_bias: bool = True,
        **factory: Any,
    ) -> None:
        super().__init__(grid, prefix_tokens)
        self.operation = f"conv{size}"
        self.number = width
        self.conv = nn.Conv2d(dim, width, size, padding=size // 2, bias=bias, **factory)
        self.norm = nn.BatchNorm2d(width, **factory)
        self.proj = nn.Linear(width, dim, bias=proj_bias, **factory)

    def operate(self, x: Tensor) -> Tensor:
        z = self.norm(self.conv(x.permute(0, 3, 1, 2)))
        return self.proj(F.relu(z).permute(0, 2, 3, 1))

"""Forwards of attentions in windows, for any number of heads: see ``forwards.py``."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torch_dimap.families.biased import BiasedAttention
from torch_dimap.families.forwards import Attention, merge, split


class Windows:
    """Windows of an image of (images, height, width, channels), padded where they stand out."""

    def __init__(self, image: Tensor, size: Any) -> None:
        self.rows, self.columns = size
        self.height, self.width = image.shape[1:3]
        self.padding = (0, 0, 0, -self.width % self.columns, 0, -self.height % self.rows)

    def split(self, image: Tensor) -> Tensor:
        """Return (images, windows, tokens, channels)."""
        padded = F.pad(image, self.padding)
        rows = padded.unflatten(2, (-1, self.columns)).unflatten(1, (-1, self.rows))
        return rows.transpose(2, 3).flatten(3, 4).flatten(1, 2)

    def join(self, windows: Tensor) -> Tensor:
        """Put windows together again, and take off what was padded."""
        down, across = -(-self.height // self.rows), -(-self.width // self.columns)
        tokens = windows.unflatten(2, (self.rows, self.columns)).unflatten(1, (down, across))
        image = tokens.transpose(2, 3).flatten(3, 4).flatten(1, 2)
        return image[:, : self.height, : self.width]


class LocallyGroupedAttention(Attention):
    """Of Twins, whose windows do not mask what is padded."""

    ws: int

    def forward(self, x: Tensor, size: Any) -> Tensor:
        image = x.unflatten(1, tuple(size))
        windows = Windows(image, (self.ws, self.ws))
        y = self.attend(*self.qkv(windows.split(image)).chunk(3, -1))
        return self.project(windows.join(y).flatten(1, 2))


def add_window_mask(attention: Tensor, mask: Tensor | None) -> Tensor:
    """Add a mask of (windows, tokens, tokens) to (images * windows, heads, tokens, tokens)."""
    if mask is None:
        return attention
    images = attention.unflatten(0, (-1, mask.shape[0]))
    return (images + mask.unsqueeze(1)).flatten(0, 1)


def cosine_attention(q: Tensor, k: Tensor, logit_scale: Tensor) -> Tensor:
    """Return SwinV2's attention before the softmax, without position bias and mask."""
    scale = logit_scale.clamp(max=math.log(100)).exp().view(-1, 1, 1)
    return F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT * scale


class SwinV2Attention(BiasedAttention):
    """SwinV2's cosine attention, one scale and one bias for each head."""

    logit_scale: Tensor
    cpb_mlp: nn.Module
    relative_coords_table: Tensor
    relative_position_index: Tensor

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = self.make_qkv(x)
        table = self.cpb_mlp(self.relative_coords_table).flatten(0, -2)
        bias = 16 * table[self.relative_position_index].permute(2, 0, 1).sigmoid()
        attention = add_window_mask(cosine_attention(q, k, self.logit_scale) + bias, mask)
        return self.project(merge(self.attn_drop(attention.softmax(-1)) @ v))


class SwinV2CrAttention(Attention):
    """The cosine attention of timm's second SwinV2."""

    logit_scale: Tensor
    _relative_positional_encodings: Any

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = (split(y, self.num_heads) for y in self.qkv(x).chunk(3, -1))
        attention = cosine_attention(q, k, self.logit_scale)
        attention = add_window_mask(attention + self._relative_positional_encodings(), mask)
        return self.project(merge(self.attn_drop(attention.softmax(-1)) @ v))


class ShiftedWindowAttention(nn.Module):
    """Of torchvision's Swin, which shifts the map inside the attention."""

    num_heads: int
    window_size: list[int]
    shift_size: list[int]
    attention_dropout: float
    dropout: float
    qkv: nn.Linear
    proj: nn.Linear
    get_relative_position_bias: Any

    def forward(self, x: Tensor) -> Tensor:
        windows = Windows(x, self.window_size)
        padded = F.pad(x, windows.padding)
        sizes = zip(self.window_size, self.shift_size, padded.shape[1:3])
        shifts = [0 if window >= size else shift for window, shift, size in sizes]
        whole = Windows(padded, self.window_size)
        rolled = padded.roll([-shift for shift in shifts], (1, 2)) if any(shifts) else padded
        y = whole.join(self.attend(whole.split(rolled), whole, shifts))
        y = y.roll(shifts, (1, 2)) if any(shifts) else y
        return y[:, : windows.height, : windows.width].contiguous()

    def attend(self, x: Tensor, windows: Windows, shifts: list[int]) -> Tensor:
        q, k, v = (split(y, self.num_heads) for y in self.make_qkv(x).chunk(3, -1))
        attention = self.compare(q, k) + self.get_relative_position_bias()
        if any(shifts):
            attention = attention + self.mask(x, windows, shifts).unsqueeze(2)
        attention = F.dropout(attention.softmax(-1), self.attention_dropout, self.training)
        y = F.linear(merge(attention @ v), self.proj.weight, self.proj.bias)
        return F.dropout(y, self.dropout, self.training)

    def make_qkv(self, x: Tensor) -> Tensor:
        return F.linear(x, self.qkv.weight, self.qkv.bias)

    def compare(self, q: Tensor, k: Tensor) -> Tensor:
        return q * q.shape[-1] ** -0.5 @ k.mT

    def mask(self, x: Tensor, windows: Windows, shifts: list[int]) -> Tensor:
        """Return what keeps apart, in each window, places that a shift has brought together."""
        regions = [
            (torch.arange(size, device=x.device) >= size - window).long()
            + (torch.arange(size, device=x.device) >= size - shift).long()
            for size, window, shift in zip(
                (windows.height, windows.width), self.window_size, shifts
            )
        ]
        region = 3 * regions[0].unsqueeze(1) + regions[1]
        of_token = windows.split(region[None, :, :, None]).squeeze(-1)
        apart = of_token.unsqueeze(-1) != of_token.unsqueeze(-2)
        return torch.zeros_like(apart, dtype=x.dtype).masked_fill(apart, -100.0)


class ShiftedWindowAttentionV2(ShiftedWindowAttention):
    """torchvision's SwinV2 attention."""

    logit_scale: Tensor

    def make_qkv(self, x: Tensor) -> Tensor:
        bias = self.qkv.bias
        if bias is not None:  # the key's counts as none
            bias = bias.unflatten(0, (3, -1)) * bias.new_tensor([[1], [0], [1]])
            bias = bias.flatten()
        return F.linear(x, self.qkv.weight, bias)

    def compare(self, q: Tensor, k: Tensor) -> Tensor:
        return cosine_attention(q, k, self.logit_scale)

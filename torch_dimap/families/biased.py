"""Forwards of attentions whose query and value alone have biases: see ``forwards.py``."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torch_dimap.families.forwards import Attention, merge, split


class BiasedAttention(Attention):
    """What BEiT, EVA and SwinV2 have in common."""

    qkv_bias_separate: bool
    q_bias: Tensor | None
    k_bias: Tensor
    v_bias: Tensor

    def make_qkv(self, x: Tensor) -> Any:
        if self.q_bias is None:
            qkv = self.qkv(x)
        else:
            bias = torch.cat((self.q_bias, self.k_bias, self.v_bias))
            if self.qkv_bias_separate:
                qkv = self.qkv(x) + bias
            else:
                qkv = F.linear(x, self.qkv.weight, bias)
        return (split(y, self.num_heads) for y in qkv.chunk(3, -1))


class BeitAttention(BiasedAttention):
    """BEiT's, whose relative positions go by a table of its own or a shared one."""

    relative_position_bias_table: Tensor | None
    _get_rel_pos_bias: Any

    def forward(self, x: Tensor, shared_rel_pos_bias: Tensor | None = None) -> Tensor:
        bias = shared_rel_pos_bias
        if self.relative_position_bias_table is not None:
            own = self._get_rel_pos_bias()
            bias = own if bias is None else own + bias
        q, k, v = self.make_qkv(x)
        return self.project(self.attend_split(q, k, v, bias))


class EvaAttention(BiasedAttention):
    """EVA-02's, whose positions are rotated in, but for those of prefix tokens."""

    num_prefix_tokens: int
    rotate_half: bool
    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    q_norm: nn.Module
    k_norm: nn.Module
    gate: nn.Module | None

    def forward(
        self, x: Tensor, rope: Tensor | None = None, attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:  # fmt: skip
        if self.qkv is not None:
            q, k, v = self.make_qkv(x)
        else:
            parts = (self.q_proj(x), self.k_proj(x), self.v_proj(x))
            q, k, v = (split(y, self.num_heads) for y in parts)
        q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = self.rotate(q, rope).type_as(v), self.rotate(k, rope).type_as(v)
        dropout = self.attn_drop.p if self.training else 0.0
        y = merge(F.scaled_dot_product_attention(q, k, v, attn_mask, dropout, is_causal))
        return self.project(y if self.gate is None else y * self.gate(x).sigmoid())

    def rotate(self, x: Tensor, rope: Tensor) -> Tensor:
        from timm.layers import apply_rot_embed_cat

        first, rest = x.split((self.num_prefix_tokens, x.shape[2] - self.num_prefix_tokens), 2)
        half = {"half": True} if self.rotate_half else {}
        return torch.cat((first, apply_rot_embed_cat(rest, rope, **half)), 2)

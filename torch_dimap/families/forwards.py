"""Forwards for attentions without some of their heads, where their own would not follow.

The forward of these modules expects as many channels inside the attention as outside.
Those here compute the same for any number of heads, with what the module holds; tests
compare the two. Only the forward is another: see ``slimming.py``.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn


def split(x: Tensor, heads: int) -> Tensor:
    """Bring (..., tokens, heads * width) to (..., heads, tokens, width)."""
    return x.unflatten(-1, (heads, x.shape[-1] // heads)).transpose(-3, -2)


def merge(x: Tensor) -> Tensor:
    """Bring (..., heads, tokens, width) to (..., tokens, heads * width)."""
    return x.transpose(-3, -2).flatten(-2)


class Attention(nn.Module):
    """What the attentions below have in common."""

    num_heads: int
    scale: float
    attn_drop: nn.Dropout
    qkv: nn.Linear
    q: nn.Module
    k: nn.Module
    v: nn.Module
    kv: nn.Module
    norm: nn.Module
    proj: nn.Module
    proj_drop: nn.Module

    def attend(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
        """Attend with queries, keys and values of (..., tokens, heads * width)."""
        q, k, v = (split(x, self.num_heads) for x in (q, k, v))
        return self.attend_split(q, k, v, bias)

    def attend_split(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
        dropout = self.attn_drop.p if self.training else 0.0
        return merge(F.scaled_dot_product_attention(q, k, v, bias, dropout, scale=self.scale))

    def project(self, x: Tensor) -> Tensor:
        return self.proj_drop(self.proj(x))


class NoHeads(Attention):
    """An attention without heads: what is left of it is the bias of its projection."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self.project(x[..., :0])


class NoNeurons(nn.Module):
    """An MLP without neurons: what is left of it is the bias of its last layer."""

    fc2: nn.Module
    drop2: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        return self.drop2(self.fc2(x[..., :0]))


class SelfAttention(Attention):
    """Of timm: ConViT's ``MHSA``, VOLO's ``Attention``."""

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(1, -2)  # VOLO's are a map
        y = self.attend(*self.qkv(tokens).chunk(3, -1))
        return self.project(y).view(x.shape)


class DaVitWindowAttention(Attention):
    """DaViT's attention inside windows."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (split(y, self.num_heads) for y in self.qkv(x).chunk(3, -1))
        return self.proj(merge(F.scaled_dot_product_attention(q, k, v, scale=self.scale)))


class NestAttention(Attention):
    """Attends in blocks, and hands its heads on entry by entry, not head by head."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (split(y, self.num_heads) for y in self.qkv(x).chunk(3, -1))
        dropout = self.attn_drop.p if self.training else 0.0
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))  # heads before blocks
        y = F.scaled_dot_product_attention(q, k, v, None, dropout, scale=self.scale)
        return self.project(y.permute(0, 2, 3, 4, 1).flatten(-2))


class ViTAttention(Attention):
    """timm's before version 1.0.20, which has no ``attn_dim``."""

    q_norm: nn.Module
    k_norm: nn.Module

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        q, k, v = (split(y, self.num_heads) for y in self.qkv(x).chunk(3, -1))
        return self.project(self.attend_split(self.q_norm(q), self.k_norm(k), v, attn_mask))


class RelPosAttention(Attention):
    """timm's ViT attention with relative positions."""

    q_norm: nn.Module
    k_norm: nn.Module
    rel_pos: Any

    def forward(self, x: Tensor, shared_rel_pos: Tensor | None = None) -> Tensor:
        q, k, v = (split(y, self.num_heads) for y in self.qkv(x).chunk(3, -1))
        bias = shared_rel_pos if self.rel_pos is None else self.rel_pos.get_bias()
        return self.project(self.attend_split(self.q_norm(q), self.k_norm(k), v, bias))


class ClassAttention(Attention):
    """Of CaiT and XCiT: the first token looks at all."""

    def forward(self, x: Tensor) -> Tensor:
        return self.project(self.attend(self.q(x[:, :1]), self.k(x), self.v(x)))


class CrossAttention(Attention):
    """Of CrossViT."""

    wq: nn.Module
    wk: nn.Module
    wv: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        return self.project(self.attend(self.wq(x[:, :1]), self.wk(x), self.wv(x)))


class CrossCovariance(Attention):
    """Of XCiT and EdgeNeXt: channels attend to each other, head by head."""

    temperature: Tensor

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (split(y, self.num_heads).mT for y in self.qkv(x).chunk(3, -1))
        attention = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT * self.temperature
        y = self.attn_drop(attention.softmax(-1)) @ v
        return self.project(merge(y.mT))


class GatedPositionalAttention(Attention):
    """ConViT's ``GPSA``."""

    qk: nn.Module
    pos_proj: nn.Module
    gating_param: Tensor
    rel_indices: Tensor
    get_rel_indices: Any

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.shape[1]
        if self.rel_indices.shape[1] != tokens:
            self.rel_indices = self.get_rel_indices(tokens)
        q, k = (split(y, self.num_heads) for y in self.qk(x).chunk(2, -1))
        content = (q @ k.mT * self.scale).softmax(-1)
        place = self.pos_proj(self.rel_indices).permute(0, 3, 1, 2).softmax(-1)
        gate = self.gating_param.view(1, -1, 1, 1).sigmoid()
        attention = (1 - gate) * content + gate * place
        attention = self.attn_drop(attention / attention.sum(-1, keepdim=True))
        return self.project(merge(attention @ split(self.v(x), self.num_heads)))


class SubsampledAttention(Attention):
    """Of Twins: keys and values come from a smaller map."""

    sr: Any

    def forward(self, x: Tensor, size: Any) -> Tensor:
        small = x if self.sr is None else self.shrink(x.mT.unflatten(2, tuple(size)))
        return self.project(self.attend(self.q(x), *self.kv(small).chunk(2, -1)))

    def shrink(self, image: Tensor) -> Tensor:
        return self.norm(self.sr(image).flatten(2).mT)


class PooledAttention(SubsampledAttention):
    """Of PVT v2, which may pool before."""

    pool: nn.Module | None
    act: Any

    def shrink(self, image: Tensor) -> Tensor:
        if self.pool is None:
            return super().shrink(image)
        return self.act(super().shrink(self.pool(image)))


class NextViTAttention(Attention):
    """Of Next-ViT: keys and values come from averaged tokens."""

    sr: nn.Module | None

    def forward(self, x: Tensor) -> Tensor:
        small = x if self.sr is None else self.norm(self.sr(x.mT)).mT
        return self.project(self.attend(self.q(x), self.k(small), self.v(small)))


class MultiHeadAttention(nn.Module):
    """``nn.MultiheadAttention`` where all of it has one width, without masks."""

    num_heads: int
    head_dim: int
    dropout: float
    batch_first: bool
    in_proj_weight: Tensor
    in_proj_bias: Tensor | None
    out_proj: nn.Linear

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None = None,
        need_weights: bool = True, attn_mask: Tensor | None = None,
        average_attn_weights: bool = True, is_causal: bool = False,
    ) -> tuple[Tensor, None]:  # fmt: skip
        if need_weights or is_causal or key_padding_mask is not None or attn_mask is not None:
            raise ValueError(
                "MultiheadAttention without some of its heads: expected need_weights=False and "
                "no masks, found other arguments: leave this layer out with rule=."
            )
        inputs = [x if self.batch_first else x.transpose(0, 1) for x in (query, key, value)]
        weights = self.in_proj_weight.chunk(3)
        none = (None, None, None)
        biases = none if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        parts = (F.linear(x, w, b) for x, w, b in zip(inputs, weights, biases))
        q, k, v = (split(x, self.num_heads) for x in parts)
        y = merge(F.scaled_dot_product_attention(q, k, v, None, self.dropout * self.training))
        y = F.linear(y, self.out_proj.weight, self.out_proj.bias)
        return (y if self.batch_first else y.transpose(0, 1)), None


class RelativePositionalAttention(nn.Module):
    """Of torchvision's MaxViT."""

    n_heads: int
    scale_factor: float
    to_qkv: nn.Module
    merge: nn.Module
    get_relative_positional_bias: Any

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (split(y, self.n_heads) for y in self.to_qkv(x).chunk(3, -1))
        bias = self.get_relative_positional_bias()
        return self.merge(merge((q @ (k * self.scale_factor).mT + bias).softmax(-1) @ v))


class HuggingFacePooledAttention(nn.Module):
    """Of the PVT v2 of transformers."""

    num_attention_heads: int
    attention_head_size: int
    linear_attention: bool
    spatial_reduction_ratio: int
    query: nn.Module
    key: nn.Module
    value: nn.Module
    attn_drop: nn.Module
    proj: nn.Module
    proj_drop: nn.Module
    spatial_reduction: nn.Module
    layer_norm: nn.Module
    pool: nn.Module
    act: nn.Module

    def forward(
        self, hidden_states: Tensor, height: int, width: int, output_attentions: bool = False
    ) -> tuple:
        x = hidden_states
        small = x
        if self.linear_attention or self.spatial_reduction_ratio > 1:
            image = x.mT.unflatten(2, (height, width))
            image = self.pool(image) if self.linear_attention else image
            small = self.layer_norm(self.spatial_reduction(image).flatten(2).mT)
            small = self.act(small) if self.linear_attention else small
        inputs = (self.query(x), self.key(small), self.value(small))
        q, k, v = (split(y, self.num_attention_heads) for y in inputs)
        attention = self.attn_drop((q @ k.mT / self.attention_head_size**0.5).softmax(-1))
        y = self.proj_drop(self.proj(merge(attention @ v)))
        return (y, attention) if output_attentions else (y,)

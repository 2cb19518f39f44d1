"""Forwards for modules without some of their units, where their own would not follow."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class NoHeads(nn.Module):
    """An attention without heads: what is left of it is the bias of its projection."""

    proj: nn.Module
    proj_drop: nn.Module

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self.proj_drop(self.proj(x[..., :0]))


class NoNeurons(nn.Module):
    """An MLP without neurons: what is left of it is the bias of its last layer."""

    fc2: nn.Module
    drop2: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        return self.drop2(self.fc2(x[..., :0]))

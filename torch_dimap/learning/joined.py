"""A model and what learns beside it, as one module."""

from __future__ import annotations

from typing import Any

from torch import nn


class Joined(nn.Module):
    """Run a model; hold the parameters that learn beside it too.

    For ``DistributedDataParallel``, which averages the gradients of the parameters of the
    module that it wraps and knows of no others, and for a state dict of both.

    Example:
        >>> import torch
        >>> both = Joined(nn.Linear(2, 3), nn.ParameterList([torch.zeros(4)]))
        >>> both(torch.ones(1, 2)).shape, list(both.state_dict())
        (torch.Size([1, 3]), ['model.weight', 'model.bias', 'beside.0'])
    """

    def __init__(self, model: nn.Module, beside: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.beside = beside

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the model returns."""
        return self.model(*args, **kwargs)

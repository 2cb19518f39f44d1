"""Whether processes that hold the same part of a tensor hold the same values."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from torch_dimap.sharding.layout import is_sharded, layout_of
from torch_dimap.sharding.processes import Processes
from torch_dimap.text import name_some

_PLACES = 1021  # that are told apart; rows of weights seldom have a length that it divides
_PRIME = (1 << 24) - 3  # so that sums over any number of processes stay whole in float64


def refuse_unlike_replicas(
    tensors: Sequence[Tensor],
    values: Sequence[Tensor],
    names: Sequence[str],
    processes: Processes,
) -> None:
    """Raise in all processes if replicas differ, of which only the first would count.

    What tells is a sum of the entries' bits, each times a number that its place gives.

    Args:
        tensors: the weights, sharded or whole in every process.
        values: what they are ranked by; the parts that are here.
        names: of the weights, for the error.
        processes: those that make the call.

    Raises:
        ValueError: names the weights whose replicas differ.
    """
    held = [i for i, tensor in enumerate(tensors) if _is_replicated(tensor)]
    if not held:  # the same in all processes, so none waits
        return
    own = np.array([float(_digest(values[i])) for i in held])
    first = processes.rank == 0
    counts = np.array([float(layout_of(tensors[i], first, names[i]).counts) for i in held])
    told = processes.add(np.concatenate([own, own * counts, np.ones_like(own), counts]))
    # Each part has as many holders as any other one of its tensor.
    everywhere, of_first, holders, parts = told.reshape(4, -1)
    unlike = [names[held[i]] for i in np.flatnonzero(everywhere * parts != of_first * holders)]
    if unlike:
        raise ValueError(
            f"{name_some(unlike)}: processes that hold the same part of a weight must hold the "
            "same values of it and of its scores, found others: broadcast them from the first."
        )


def _is_replicated(tensor: Tensor) -> bool:
    if not is_sharded(tensor):
        return True
    sizes = zip(tensor.placements, tensor.device_mesh.shape)
    return any(placement.is_replicate() and size > 1 for placement, size in sizes)


def _digest(part: Tensor) -> int:
    whole = part.detach().reshape(-1).contiguous()
    bits = whole.view(torch.int16)  # of all dtypes that can be ranked
    rest = len(bits) % _PLACES
    sums = bits[: len(bits) - rest].view(-1, _PLACES).sum(0, dtype=torch.int64)
    sums[:rest] += bits[len(bits) - rest :]
    place = torch.arange(1, _PLACES + 1, device=sums.device)
    return int((sums * place).sum()) % _PRIME

"""Whole tensors in the first process alone, one at a time, when that asks for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from torch_dimap.sharding.layout import is_sharded, layout_of, local_of
from torch_dimap.sharding.processes import Processes, agree

Whole = Callable[[str], Tensor]  # name -> the tensor with all of its entries


def lend_to_first(
    processes: Processes | None,
    tensors: Mapping[str, Tensor],
    work: Callable[[Whole], None],
    caller: str,
) -> None:
    """Do a work in the first process, to which the others hand their parts of tensors.

    Whatever the order in which it asks for them, and whether or not it asks for all.

    Args:
        processes: those that hold the tensors, which all make this call; None for this one alone.
        tensors: by name, the same names everywhere.
        work: called in the first process, with what returns a tensor by its name: whole, on the
            CPU where it is sharded.
        caller: the function that was called, for messages.

    Raises:
        Exception: what the work raises, in all processes.
    """
    if processes is None:
        return work(tensors.__getitem__)

    def ask(name: str) -> Tensor:
        if not is_sharded(tensors[name]):
            return tensors[name]
        processes.gather_object(name)
        return _join(processes, tensors[name], name)

    def work_and_dismiss() -> tuple[None, None]:
        try:
            work(ask)
        finally:
            processes.gather_object(None)
        return None, None

    def help_until_dismissed() -> tuple[None, None]:
        while (name := processes.gather_object(None)[0]) is not None:
            _join(processes, tensors[name], name)
        return None, None

    agree(processes, help_until_dismissed if processes.rank else work_and_dismiss, caller)


def _join(processes: Processes, tensor: Tensor, name: str) -> Tensor:
    """Put the parts of a tensor together in the first process; return there the whole."""
    layout = layout_of(tensor, processes.rank == 0, name)
    own = local_of(tensor).contiguous().view(-1)[: None if layout.counts else 0]
    places = processes.gather_object(layout.slices if layout.counts else None)
    parts = processes.gather_to_first(own.view(torch.uint8))
    whole = torch.empty(layout.shape if parts else (), dtype=tensor.dtype)
    for place, part in zip(places, parts):
        if place is not None:
            here = whole[place]
            here.copy_(part.view(tensor.dtype).view(here.shape))
    return whole

"""How processes that share a model's weights tell one another what they have read."""

from __future__ import annotations

import builtins
import hashlib
import pickle
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import Any, NoReturn, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from torch_dimap.sharding.layout import is_sharded
from torch_dimap.sharding.messages import packed, unpacked

T = TypeVar("T")
P = TypeVar("P", bound=tuple)

LENGTH = 8  # bytes that tell how many follow
FIRST = 1 << 8  # that travel with them: all of most messages, which then need no second exchange


class Processes:
    """Those that hold parts of the same tensors. All must make the same calls, in order.

    Nothing is kept between calls. What one process raises between two of them the others do
    not see: they wait until torch's own time limit, or the end of that process, tells them.
    """

    def __init__(self, ranks: tuple[int, ...], device: str) -> None:
        self._group = _group(ranks, dist.group.WORLD)
        self._first = ranks[0]
        self._device = device
        self.processes = len(ranks)
        self.rank = ranks.index(dist.get_rank())

    def add(self, numbers: np.ndarray) -> np.ndarray:
        """Sum vectors of float64 over all processes."""
        return self._reduce(numbers, dist.ReduceOp.SUM)

    def least(self, numbers: np.ndarray) -> np.ndarray:
        """Return the least of each float64 over all processes."""
        return self._reduce(numbers, dist.ReduceOp.MIN)

    def add_up(self, tensor: Tensor) -> None:
        """Sum a tensor over all processes, in its place."""
        dist.all_reduce(tensor, group=self._group)

    def hand_out(self, tensor: Tensor) -> None:
        """Fill a tensor of each process with that of the first."""
        dist.broadcast(tensor, self._first, group=self._group)

    def gather(self, parts: Sequence[P]) -> list[list[P]]:
        """Return for each place in the list what every process has put there.

        Args:
            parts: named tuples of numbers, values and counts (an array, or None).
        """
        told = [unpacked(data) for data in self._gather_bytes(packed(parts))]
        return [[type(own)(*part) for part in of_all] for own, *of_all in zip(parts, *told)]

    def gather_object(self, value: Any) -> list[Any]:
        """Return what every process has given, in their order."""
        return [pickle.loads(data) for data in self._gather_bytes(pickle.dumps(value))]

    def gather_to_first(self, own: Tensor) -> list[Tensor]:
        """Hand a vector of each process, of any length, to the first; the others get nothing."""
        sizes = self.gather_object(own.numel())
        padded = torch.zeros(max(sizes), dtype=own.dtype, device=self._device)
        padded[: own.numel()] = own
        parts = None if self.rank else [torch.empty_like(padded) for _ in sizes]
        dist.gather(padded, parts, self._first, self._group)
        return [part[:size].cpu() for part, size in zip(parts or (), sizes)]

    def _reduce(self, numbers: np.ndarray, operation: Any) -> np.ndarray:
        own = torch.from_numpy(np.array(numbers, np.float64)).to(self._device)
        dist.all_reduce(own, operation, group=self._group)  # the same bits in every process
        return own.cpu().numpy()

    def _gather_bytes(self, data: bytes) -> list[bytes]:
        told = self._gather(len(data).to_bytes(LENGTH, "little") + data[:FIRST], LENGTH + FIRST)
        sizes = [int.from_bytes(x[:LENGTH], "little") for x in told]
        rest = max(sizes) - FIRST
        more = self._gather(data[FIRST:], rest) if rest > 0 else [b""] * self.processes
        return [(x[LENGTH:] + y)[:size] for x, y, size in zip(told, more, sizes)]

    def _gather(self, data: bytes, size: int) -> list[bytes]:
        """Return what each process has given, all filled up to one size."""
        own = torch.frombuffer(bytearray(data.ljust(size, b"\0")), dtype=torch.uint8)
        own = own.to(self._device)
        parts = [torch.empty_like(own) for _ in range(self.processes)]
        dist.all_gather(parts, own, group=self._group)
        return [part.cpu().numpy().tobytes() for part in parts]


def agree(
    processes: Processes | None, check: Callable[[], tuple[T, object]], caller: str
) -> T:
    """Make a check in every process; what fails in one of them fails in all, in the same words.

    Args:
        processes: those that make the call; None for this one alone.
        check: looks at what is here. Returns what it finds, and what must be the same everywhere,
            anything that can be pickled.
        caller: the function that was called, for messages.

    Returns:
        What ``check`` finds here.

    Raises:
        ValueError: if the processes were asked for different things.
    """
    if processes is None:
        return check()[0]
    result, asked, error = None, b"", None
    try:
        result, call = check()
        asked = hashlib.sha256(pickle.dumps(call)).digest()
    except Exception as raised:
        error = raised
    told = processes.gather_object((asked, error and (type(error).__name__, str(error))))
    for _, failure in told:
        if failure is not None:
            raise getattr(builtins, failure[0], RuntimeError)(failure[1]) from error
    different = [i for i, (other, _) in enumerate(told) if other != told[0][0]]
    if different:
        raise ValueError(
            f"{caller}: all processes must make the same call on the same model, found another "
            f"one in process {different[0]} than in the first: call it alike everywhere."
        )
    return result  # type: ignore[return-value]


def refuse_everywhere(processes: Processes | None, error: Exception, caller: str) -> NoReturn:
    """Raise an error in all processes, of which the others are at a check by :func:`agree`."""

    def fail() -> NoReturn:
        raise error

    agree(processes, fail, caller)
    raise error


def processes_of(tensors: Iterable[Tensor], caller: str) -> Processes | None:
    """Return those that hold parts of the tensors; None if no tensor is sharded.

    Args:
        tensors: parameters or masks.
        caller: the function that was called, for messages.

    Raises:
        ValueError: if the tensors are spread over different processes.
    """
    meshes = {tensor.device_mesh for tensor in tensors if is_sharded(tensor)}
    ranks = {tuple(sorted(mesh.mesh.flatten().tolist())) for mesh in meshes}
    if len(ranks) > 1:
        numbers = ", ".join(str(list(x[:4])) for x in sorted(ranks)[:2])
        raise ValueError(
            f"{caller}: all weights must be spread over the same processes, found some on the "
            f"ranks {numbers}: prune those of each mesh in a call of their own."
        )
    if not ranks:
        return None
    return Processes(ranks.pop(), next(iter(meshes)).device_type)


@lru_cache(maxsize=None)
def _group(ranks: tuple[int, ...], world: Any) -> Any:
    """Return torch's group of ranks: that of all, or one that is made once in each world."""
    if len(ranks) == dist.get_world_size():
        return world
    return dist.new_group(list(ranks), use_local_synchronization=True)

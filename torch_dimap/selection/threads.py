"""Several weights worked on at once."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import Barrier
from typing import Any

import torch

Map = Callable[..., Iterator]  # called like the built-in map


@contextmanager
def threaded_map(tasks: int, on_cpu: bool = True) -> Iterator[Map]:
    """Yield a ``map`` that works on as many items at once as torch has threads.

    Left to itself torch would share every operation on a block among all threads, and
    wherever another process holds a core each of these thousands of meetings waits for it.

    Args:
        tasks: how many items are worth a thread; below two, all is done by the caller's own.
        on_cpu: False leaves all to the caller's thread, too.
    """
    threads = min(torch.get_num_threads(), tasks)
    if threads <= 1 or not on_cpu:
        yield map
        return
    with ThreadPoolExecutor(threads) as pool:
        try:
            _limit_to_one(pool, threads)
            yield pool.map
        except BaseException:  # also Ctrl-C: do not work off what is waiting
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _limit_to_one(pool: ThreadPoolExecutor, workers: int) -> None:
    """Let torch use one thread in each worker, and as many as before in all others.

    What a thread sets holds for itself, and for those that call torch for the first time
    later on. So it is set back at once, not to limit threads of other parts of a program.
    """
    before = torch.get_num_threads()
    limited = Barrier(workers)  # each waits for all others, so that each takes one

    def limit() -> None:
        torch.get_num_threads()  # from this first call on its own setting counts
        torch.set_num_threads(1)
        limited.wait()

    try:
        for future in [pool.submit(limit) for _ in range(workers)]:
            future.result()
    except BaseException:  # also Ctrl-C, before all have begun
        limited.abort()
        raise
    finally:
        torch.set_num_threads(before)


def thrifty(map_: Map) -> Map:
    """Return a ``map`` that gives memory back to the system after each item.

    glibc keeps what is freed between small things that live on, for each thread apart:
    about 40 MB here. Other allocators are left to themselves.
    """
    trim: Any = getattr(ctypes.CDLL(None), "malloc_trim", None)

    def mapped(function: Callable, *iterables: Any) -> Iterator:
        def call(*arguments: Any) -> Any:
            try:
                return function(*arguments)
            finally:
                trim(0)

        return map_(call, *iterables)

    return mapped if trim else map_

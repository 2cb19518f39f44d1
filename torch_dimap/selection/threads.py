"""Several layers worked on at once."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def each_layer(layers: int, on_cpu: bool = True) -> Iterator[Callable[..., Iterator]]:
    """Yield a ``map`` that works on as many layers at once as torch has threads.

    Left to itself torch would share every operation on a block among all threads, and
    wherever another process holds a core each of these thousands of meetings waits for it.
    """
    threads = torch.get_num_threads()
    if min(threads, layers) <= 1 or not on_cpu:
        yield map
        return
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            try:
                yield pool.map
            except BaseException:  # also Ctrl-C: do not work off what is waiting
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    finally:  # the workers' setting is also what threads started later would get
        torch.set_num_threads(threads)


def thrifty(each: Callable[..., Iterator]) -> Callable[..., Iterator]:
    """Return a ``map`` that gives memory back to the system after each layer.

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

        return each(call, *iterables)

    return mapped if trim else each

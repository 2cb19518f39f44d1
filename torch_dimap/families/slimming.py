"""A module's class with another forward, as one class."""

from __future__ import annotations

import functools
from typing import Any

from torch import nn


def slim_class(original: type[nn.Module], forward: Any) -> type[nn.Module]:
    """Return a class that is the original one in all but its forward."""
    return _joined(original_class(original), forward)


def original_class(kind: Any) -> Any:
    """Return the class whose forward, or part of it, :func:`slim_class` has replaced."""
    package = __name__.partition(".")[0]
    return next(base for base in kind.__mro__ if base.__module__.partition(".")[0] != package)


def is_ours(kind: type) -> bool:
    """Tell the classes of this folder from those whose forward they replace."""
    return kind.__module__.startswith(__package__ or "")


@functools.cache
def _joined(base: Any, forward: Any) -> type[nn.Module]:
    def reduce(self: nn.Module, protocol: Any) -> tuple:  # the class has no name to pickle it by
        return _blank, (base, forward), self.__dict__

    return type(f"Slim{base.__name__}", (forward, base), {
        "__module__": __name__, "__reduce_ex__": reduce,
    })  # fmt: skip


def _blank(base: Any, forward: Any) -> nn.Module:
    kind = _joined(base, forward)
    return kind.__new__(kind)

"""What is put on a model while something is learned, and comes off again."""

from __future__ import annotations

import contextlib
from typing import TypeVar

from torch import nn

Self = TypeVar("Self", bound="Attached")


class Attached(nn.Module):
    """Parameters that learn beside a model: a context, at whose end the model is as it was."""

    _undo: contextlib.ExitStack | None = None  # takes off what is on the model; None: nothing is

    def __enter__(self: Self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def remove(self) -> None:
        """Leave the model as it was, but for what it has learned; what is held here stays."""
        if self._undo is not None:
            self._undo.close()
        self._undo = None

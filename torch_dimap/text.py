"""Words and cells that several floors use: messages, warnings, tables for people."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence
from types import FrameType

_PACKAGE = os.path.dirname(__file__) + os.sep
Cells = Sequence[Sequence[str]]  # the first row is the header


def name_some(names: Sequence[str]) -> str:
    """List at most three names, then a count.

    >>> name_some(["a", "b", "c", "d", "e"])
    'a, b, c and 2 more'
    """
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def warn(message: str) -> None:
    """Warn at the line that called into the package, however deep inside it this is."""
    frame: FrameType | None = sys._getframe()
    level = 1
    while frame is not None and frame.f_code.co_filename.startswith(_PACKAGE):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)


def warn_of_empty(labels: Sequence[str], caller: str) -> None:
    """Warn of layers that a call leaves without any weight."""
    if labels:
        warn(f"{caller}: no weight is left in {name_some(labels)}.")


def aligned(cells: Cells, left: int) -> list[str]:
    """Return a line for each row; the first ``left`` columns begin, the others end, together."""
    widths = [max(map(len, column)) for column in zip(*cells)]
    return [
        "  ".join(
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths))
        ).rstrip()
        for row in cells
    ]


def markdown(cells: Cells, left: int) -> str:
    """Return a Markdown table, its first ``left`` columns aligned to the left."""
    header, *body = cells
    ruler = ["---" if i < left else "---:" for i in range(len(header))]
    return "\n".join(f"| {' | '.join(row)} |" for row in [header, ruler, *body])

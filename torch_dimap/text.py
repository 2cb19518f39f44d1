"""Cells of text as a table for people: aligned, or in Markdown."""

from __future__ import annotations

from collections.abc import Sequence

Cells = Sequence[Sequence[str]]  # the first row is the header


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

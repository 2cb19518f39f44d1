"""The table of what pruning has left: its rows, and its forms for people and for programs."""

from __future__ import annotations

import csv
import html
import io
import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch_dimap.accounting.flops import Flops
from torch_dimap.text import aligned, markdown

# Record key -> column title and format in tables for people. FLOPs are shown in millions.
_COLUMNS = {
    "name": ("layer", ""),
    "group": ("group", ""),
    "shape": ("shape", ""),
    "weights": ("weights", ",d"),
    "share_of_prunable": ("of prunable", ".2%"),
    "share_of_all": ("of params", ".2%"),
    "zeros": ("zeros", ",d"),
    "density": ("density", ".4f"),
    "threshold": ("threshold", ".2e"),
    "dead_rows": ("dead rows", ",d"),
    "dead_columns": ("dead cols", ",d"),
    "dense_flops": ("dense MFLOPs", ",.1f"),
    "share_of_flops": ("of FLOPs", ".2%"),
    "masked_flops": ("masked MFLOPs", ",.1f"),
    "uniform_flops": ("uniform MFLOPs", ",.1f"),
    "units": ("units", ",d"),
    "units_kept": ("units kept", ",d"),
    "slim_flops": ("slim MFLOPs", ",.1f"),
}
_WIDTH = 120  # of a table in a terminal
_NAME = 44  # of a layer in it
# What a table that is too wide does without, in this order; the other forms have all columns.
_LESS = ("share_of_all", "share_of_flops", "dead_columns", "dead_rows", "share_of_prunable",
         "zeros", "uniform_flops", "shape", "units", "threshold")  # fmt: skip
_BRIEF = ("name", "weights", "density", "threshold", "dense_flops", "masked_flops", "units_kept",
          "slim_flops")  # fmt: skip
_MEGA = ("dense_flops", "masked_flops", "uniform_flops", "slim_flops")


class Row(NamedTuple):
    """One line of a :class:`Summary`.

    Attributes:
        level: ``"layer"``, ``"group"`` or ``"total"``.
        name: of a layer, its tensor's name in the state dict; of a group, its key; of
            the totals, ``"prunable"`` for all groups and ``"model"`` for all parameters.
        group: the group that a layer belongs to.
        shape: of a layer.
        weights: how many there are.
        zeros: how many of them are zero. Outside of the groups nobody looks for zeros.
        dead_rows: rows of a weight without one that is not zero: constant outputs.
        dead_columns: columns without one: inputs that do not matter.
        threshold: the highest score that went from a group, where known.
        flops: multiply-adds, where counted.
        units: heads or neurons that the layer had at first; of a group, those of its
            layers. None unless the model has lost units, or has dead ones.
        units_kept: how many of them are neither removed nor dead.
        slim_flops: multiply-adds once the dead units are removed, where counted.
    """

    level: str
    name: str
    weights: int
    zeros: int
    dead_rows: int
    dead_columns: int
    group: str | None = None
    shape: tuple[int, ...] | None = None
    threshold: float | None = None
    flops: Flops | None = None
    units: int | None = None
    units_kept: int | None = None
    slim_flops: int | None = None

    @property
    def density(self) -> float:
        return 1 - self.zeros / max(1, self.weights)


@dataclass(frozen=True)
class Summary:
    """What :func:`summarize` found; ``str()`` gives an aligned table, a notebook a short one.

    Attributes:
        layers: a :class:`Row` for each layer, group by group.
        groups: one for each group.
        prunable: one for all groups together.
        model: one for all parameters of the model.
        note: which FLOPs are shown; empty where none are.
    """

    layers: list[Row]
    groups: list[Row]
    prunable: Row
    model: Row
    note: str

    def __str__(self) -> str:
        """Return a table for people: aligned, sections apart, at most 120 columns wide.

        Columns that do not fit are left out, and long names are cut in their middle; the
        other forms have all of it.
        """
        shown, left_out = self._columns(), []
        lines = self._lines(shown)
        for key in (key for key in _LESS if key in shown):
            if max(map(len, lines)) <= _WIDTH:
                break
            left_out.append(_COLUMNS[key][0])
            shown = [column for column in shown if column != key]
            lines = self._lines(shown)
        rule = "-" * max(map(len, lines))
        for last in (len(self.layers) + len(self.groups), len(self.layers), 0):
            lines.insert(last + 1, rule)
        notes = [self.note] if self.note else []
        if left_out:
            notes.append(f"not shown, in to_markdown() and to_csv(): {', '.join(left_out)}")
        return "\n".join([*lines, rule, *notes] if notes else lines)

    def _repr_html_(self) -> str:
        """Return what a notebook shows: groups and totals, and the layers to unfold."""
        shown = [key for key in self._columns() if key in _BRIEF]
        totals = self._cells([*self.groups, self.prunable, self.model], shown)
        layers = self._cells(self.layers, [key for key in shown if key != "threshold"])
        count = f"{len(self.layers):,} layer{'s' if len(self.layers) != 1 else ''}"
        note = f"<p><small>{html.escape(self.note)}</small></p>" if self.note else ""
        return (
            f"{_html_table(totals)}<details><summary>{count}</summary>{_html_table(layers)}"
            f"</details>{note}"
        )

    def to_markdown(self) -> str:
        """Return the same as a Markdown table, with its note below."""
        table = markdown(self._cells(self._rows(), self._columns()), left=3)
        return f"{table}\n\n{self.note}" if self.note else table

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, ready for JSON: FLOPs and weights as ints, shares in [0, 1]."""
        return {
            "layers": [self._record(row) for row in self.layers],
            "groups": [self._record(row) for row in self.groups],
            "prunable": self._record(self.prunable),
            "model": self._record(self.model),
            "note": self.note,
        }

    def to_csv(self, path: str | os.PathLike[str] | None = None) -> str:
        """Return the data as CSV, a line for each row, and write it to ``path`` if given."""
        stream = io.StringIO()
        records = [self._record(row) for row in self._rows()]
        writer = csv.DictWriter(stream, list(records[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows({**record, "shape": by(record["shape"])} for record in records)
        if path is not None:
            with open(path, "w", encoding="utf-8", newline="") as file:
                file.write(stream.getvalue())
        return stream.getvalue()

    def _rows(self) -> list[Row]:
        return [*self.layers, *self.groups, self.prunable, self.model]

    def _record(self, row: Row) -> dict[str, Any]:
        dense, masked, uniform = row.flops or (None, None, None)
        whole = self.model.flops.dense if self.model.flops else None
        return {
            "level": row.level,
            "name": row.name,
            "group": row.group,
            "shape": row.shape and list(row.shape),
            "weights": row.weights,
            "share_of_prunable": (
                None
                if (row.level, row.name) == (self.model.level, self.model.name)
                else row.weights / max(1, self.prunable.weights)
            ),
            "share_of_all": row.weights / max(1, self.model.weights),
            "zeros": row.zeros,
            "density": row.density,
            "threshold": row.threshold,
            "dead_rows": row.dead_rows,
            "dead_columns": row.dead_columns,
            "dense_flops": dense,
            "share_of_flops": None if dense is None else dense / max(1, whole or 0),
            "masked_flops": masked,
            "uniform_flops": uniform,
            "units": row.units,
            "units_kept": row.units_kept,
            "slim_flops": row.slim_flops,
        }

    def _columns(self) -> list[str]:
        """Return the keys of the columns that say something."""
        records = [self._record(row) for row in self._rows()]
        return [key for key in _COLUMNS if any(record[key] is not None for record in records)]

    def _cells(self, rows: Iterable[Row], shown: list[str]) -> list[list[str]]:
        """Return header and rows as text."""
        records = [self._record(row) for row in rows]
        return [
            [_COLUMNS[key][0] for key in shown],
            *([_cell(key, record[key]) for key in shown] for record in records),
        ]

    def _lines(self, shown: list[str]) -> list[str]:
        rows = [row._replace(name=_shortened(row.name)) for row in self._rows()]
        left = sum(key in ("name", "group", "shape") for key in shown)
        return aligned(self._cells(rows, shown), left)


def _cell(key: str, value: Any) -> str:
    if value is None:
        return ""
    if key == "shape":
        return by(value)
    return format(value / 1e6 if key in _MEGA else value, _COLUMNS[key][1])


def _shortened(name: str) -> str:
    """Cut the middle out of a long name: its beginning and its end tell the layer."""
    if len(name) <= _NAME:
        return name
    half = (_NAME - 1) // 2
    return f"{name[: _NAME - 1 - half]}…{name[-half:]}"


def _html_table(cells: list[list[str]]) -> str:
    """Return a plain table, whose looks are the notebook's."""
    header, *rows = [[html.escape(cell) for cell in row] for row in cells]
    lines = [f"<th>{'</th><th>'.join(header)}</th>"]
    lines += [f"<td>{'</td><td>'.join(row)}</td>" for row in rows]
    return f"<table><tr>{'</tr><tr>'.join(lines)}</tr></table>"


def by(shape: Iterable[int] | None) -> str:
    """Write a shape as 3x4."""
    return "x".join(map(str, shape or ()))

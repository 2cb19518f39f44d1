"""The table of what pruning has left: layers, groups and totals."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn

from torch_dimap.accounting.flops import Flops, count_flops
from torch_dimap.accounting.thresholds import check_thresholds
from torch_dimap.masking import Layer, Pair, find_layers_in
from torch_dimap.text import aligned, markdown

NOTE = (
    "FLOPs: multiply-adds for inputs of {inputs}. masked: every layer weighted by its own\n"
    "density. uniform, the paper's convention: every layer weighted by its group's density.\n"
    "Savings are theoretical: dense kernels do not run faster on zeros."
)

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
}
_MEGA = ("dense_flops", "masked_flops", "uniform_flops")


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

    @property
    def density(self) -> float:
        return 1 - self.zeros / max(1, self.weights)


@dataclass(frozen=True)
class Summary:
    """What :func:`summarize` found; ``str()`` gives an aligned table.

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
        """Return a table for people: aligned, sections apart, with its note."""
        lines = aligned(self._cells(), left=3)
        rule = "-" * max(map(len, lines))
        for last in (len(self.layers) + len(self.groups), len(self.layers), 0):
            lines.insert(last + 1, rule)
        return "\n".join([*lines, rule, self.note] if self.note else lines)

    def to_markdown(self) -> str:
        """Return the same as a Markdown table, with its note below."""
        table = markdown(self._cells(), left=3)
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
        writer.writerows({**record, "shape": _by(record["shape"])} for record in records)
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
                None if row is self.model else row.weights / max(1, self.prunable.weights)
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
        }

    def _cells(self) -> list[list[str]]:
        """Return header and rows as text, without the columns that say nothing."""
        records = [self._record(row) for row in self._rows()]
        shown = [key for key in _COLUMNS if any(record[key] is not None for record in records)]
        return [
            [_COLUMNS[key][0] for key in shown],
            *([_cell(key, record[key]) for key in shown] for record in records),
        ]


def summarize(
    model: nn.Module,
    inputs: Tensor | tuple[Any, ...] | None = None,
    parameters: Mapping[str, Iterable[Pair]] | Iterable[Pair] | None = None,
    thresholds: Mapping[str, float] | None = None,
) -> Summary:
    """Tell by layer, by group and in all what pruning has left of a model.

    Shares are given of two wholes: the prunable weights, and all parameters of the
    model (biases, norms, embeddings and heads included). Masked and baked models give
    the same numbers: a weight counts as gone if it is zero.

    Args:
        model: the model; it is only read.
        inputs: what to call the model with; then FLOPs are counted too, see
            :func:`torch_dimap.count_flops`.
        parameters: group -> ``(module, name)`` pairs, or pairs alone. Default:
            ``group_parameters(model)``.
        thresholds: group -> threshold, as the pruning call returned them.

    Returns:
        A :class:`Summary`: ``str()`` or ``.to_markdown()`` for people, ``.to_dict()``
        and ``.to_csv()`` for programs.

    Raises:
        TypeError, ValueError: for ``parameters`` that do not fit the model, or
            thresholds of unknown groups.
        NotImplementedError: if FLOPs cannot be counted.

    Example:
        >>> net = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> _ = nn.utils.prune.l1_unstructured(net[0], "weight", amount=0.25)
        >>> table = summarize(net, parameters={"first": [(net[0], "weight")]})
        >>> table.groups[0].density, table.model.zeros, table.model.weights
        (0.75, 8, 46)
    """
    groups = find_layers_in(model, parameters, "summarize()")
    check_thresholds(thresholds, groups, "summarize()")
    pairs = {g: [(x.module, x.name) for x in layers] for g, layers in groups.items()}
    flops = None if inputs is None else count_flops(model, inputs, pairs)
    rows = {
        group: [_layer_row(x, group, flops.layers[x.label] if flops else None) for x in members]
        for group, members in groups.items()
    }
    layers = [row for members in rows.values() for row in members]
    in_all = Flops(*map(sum, zip(*flops.groups.values()))) if flops else None
    prunable = _total("total", "prunable", layers, in_all)
    return Summary(
        layers=layers,
        groups=[
            _total("group", group, members, flops.groups[group] if flops else None)._replace(
                threshold=(thresholds or {}).get(group)
            )
            for group, members in rows.items()
        ],
        prunable=prunable,
        model=prunable._replace(
            name="model",
            weights=sum(parameter.numel() for parameter in model.parameters()),
            flops=Flops(flops.dense, flops.masked, flops.uniform) if flops else None,
        ),
        note="" if inputs is None else NOTE.format(inputs=_shapes(inputs)),
    )


def _layer_row(layer: Layer, group: str, flops: Flops | None) -> Row:
    alive = layer.weight != 0
    shape = tuple(alive.shape)
    if alive.dim() < 2:
        alive = alive.reshape(-1, 1)
    return Row(
        level="layer",
        name=layer.label,
        weights=alive.numel(),
        zeros=int((~alive).sum()),
        dead_rows=int((~alive.flatten(1).any(1)).sum()),
        dead_columns=int((~alive.transpose(0, 1).flatten(1).any(1)).sum()),
        group=group,
        shape=shape,
        flops=flops,
    )


def _total(level: str, name: str, rows: list[Row], flops: Flops | None) -> Row:
    return Row(
        level=level,
        name=name,
        weights=sum(row.weights for row in rows),
        zeros=sum(row.zeros for row in rows),
        dead_rows=sum(row.dead_rows for row in rows),
        dead_columns=sum(row.dead_columns for row in rows),
        flops=flops,
    )


def _cell(key: str, value: Any) -> str:
    if value is None:
        return ""
    if key == "shape":
        return _by(value)
    return format(value / 1e6 if key in _MEGA else value, _COLUMNS[key][1])


def _by(shape: Iterable[int] | None) -> str:
    return "x".join(map(str, shape or ()))


def _shapes(inputs: Tensor | tuple[Any, ...]) -> str:
    tensors = [inputs] if isinstance(inputs, Tensor) else inputs
    return " and ".join(_by(x.shape) for x in tensors if isinstance(x, Tensor))

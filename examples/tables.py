"""What models come to, in rows and in tables."""

from __future__ import annotations

import argparse

import slim
from images import test_loader
from torch import nn
from torch.utils.data import Dataset

from torch_dimap.text import markdown


def top1(model: nn.Module, test: Dataset, options: argparse.Namespace) -> float:
    """Return how many in a hundred of the test images a model gets right."""
    return slim.top1(model, test_loader(test, options), options)


def results(
    models: dict[str, nn.Module], test: Dataset, options: argparse.Namespace
) -> list[dict]:
    """Return a row of figures for each model."""
    image = test[0][0][None].to(options.device)
    rows = [{"model": name, "top1": top1(model, test, options), **slim.measures(model, image)}
            for name, model in models.items()]  # fmt: skip
    whole = rows[0]["multiply-adds, M"]
    return [{**row, "share of the multiply-adds": row["multiply-adds, M"] / whole} for row in rows]


def as_text(value: object) -> str:
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 100 else f"{value:,.1f}"
    return str(value)


def as_table(rows: list[dict], left: int = 1) -> str:
    """Lay out rows under the names of their fields."""
    return markdown([list(rows[0]), *(list(map(as_text, row.values())) for row in rows)], left)

"""Table 1 of the paper: its numbers, and ours beside them."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import NamedTuple

import torch

from torch_dimap.accounting import count_flops, summarize, weigh
from torch_dimap.command.models import build
from torch_dimap.masking import find_layers_in, global_module_aware_unstructured, group_parameters

# Size -> amount -> what the paper prints: parameters kept in millions, and in per cent
# what went of the parameters and of the FLOPs. The paper calls the amounts DIMAP1 to 3.
PAPER = {
    "base": {0.15: (75.2, 14.3, 14.4), 0.35: (58.4, 33.4, 33.5), 0.55: (41.7, 52.5, 52.7)},
    "small": {0.15: (42.5, 14.2, 14.3), 0.35: (33.1, 33.2, 33.2), 0.55: (23.7, 52.2, 52.3)},
    "tiny": {0.15: (24.4, 13.7, 13.9), 0.35: (19.2, 32.0, 32.4), 0.55: (14.0, 50.3, 50.8)},
}

HEADER = [
    "model",
    "amount",
    "params, ours",
    "paper",
    "params gone, ours",
    "paper",
    "uniform FLOPs gone, ours",
    "paper",
    "masked FLOPs gone, ours",
]


class Table1Row(NamedTuple):
    """One pruned Swin Transformer, 224 x 224, 1000 classes.

    Attributes:
        size: ``"base"``, ``"small"`` or ``"tiny"``.
        amount: the fraction of the prunable weights that went.
        parameters: of the dense model.
        kept: of them, those that are not zero.
        dense: multiply-adds of the dense model for one image.
        masked: the same, every layer weighted by its own density; depends on the weights.
        uniform: the same, every layer weighted by its group's density, as in the paper.
    """

    size: str
    amount: float
    parameters: int
    kept: int
    dense: int
    masked: int
    uniform: int


def table1(sizes: Iterable[str] = tuple(PAPER), pretrained: bool = False) -> list[Table1Row]:
    """Count parameters and FLOPs of the nine models of Table 1.

    Parameters and uniform FLOPs follow from the amounts alone; masked FLOPs depend on
    the weights, and random ones tell little of trained ones.

    Args:
        sizes: which of ``"base"``, ``"small"`` and ``"tiny"``.
        pretrained: take timm's weights, trained on ImageNet-1K as in the paper; else
            random ones, the same in every run.

    Returns:
        A :class:`Table1Row` for each size and amount.

    Raises:
        ValueError: for another size.
        RuntimeError: if pretrained weights cannot be had.

    Source: He and Zhou, ICLR 2024, Table 1.
    """
    rows = []
    for size in sizes:
        if size not in PAPER:
            raise ValueError(f"table1(): sizes must be among {list(PAPER)}, found {size!r}.")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = build(f"swin_{size}_patch4_window7_224.ms_in1k", pretrained)
        count = count_flops(model, torch.zeros(1, 3, 224, 224))
        dense = {label: of_layer.dense for label, of_layer in count.layers.items()}
        for amount in PAPER[size]:
            pruned = copy.deepcopy(model)
            global_module_aware_unstructured(group_parameters(pruned), amount=amount)
            flops = weigh(count.dense, dense, find_layers_in(pruned, None, "table1()"))
            whole = summarize(pruned).model
            kept = whole.weights - whole.zeros
            counts = flops.dense, flops.masked, flops.uniform
            rows.append(Table1Row(size, amount, whole.weights, kept, *counts))
    return rows


def table1_cells(rows: Iterable[Table1Row]) -> list[list[str]]:
    """Lay rows out beside the paper's numbers, each in a column of its own."""
    cells = [HEADER]
    for row in rows:
        kept, parameters, flops = PAPER[row.size][row.amount]
        cells.append(
            [
                f"Swin-{row.size[0].upper()}",
                f"{row.amount:.0%}",
                f"{row.kept / 1e6:.2f} M",
                f"{kept:.1f} M",
                f"{1 - row.kept / row.parameters:.2%}",
                f"{parameters:.1f}%",
                f"{1 - row.uniform / row.dense:.2%}",
                f"{flops:.1f}%",
                f"{1 - row.masked / row.dense:.2%}",
            ]
        )
    return cells

"""The commands that work on files: ``prune``, ``expand`` and ``inspect``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from torch_dimap.files import expand_checkpoint, group_names, inspect_checkpoint, prune_checkpoint
from torch_dimap.storage import open_weights

SOURCE = """\
a .safetensors file, an index of shards (*.safetensors.index.json), what torch.save wrote, or a
folder of the Hugging Face hub with one of these; no code in it is run"""


def add_prune(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``prune``."""
    _add_files(parser)
    parser.add_argument(
        "--amount",
        type=named_amount,
        nargs="+",
        required=True,
        metavar="A",
        help="how much goes: with a point or a percent sign, the share of every group (0.55, "
        "55%%); without, the number of weights in all (40000000); or group by group (qkv=0.3 "
        "mlp=50%%), where a group that is not named stays as it is",
    )
    parser.add_argument(
        "--compressed",
        action="store_true",
        help="write masks as bits and only the values that they keep, which load_pruned and "
        "'expand' read (default: whole tensors, which any reader of safetensors loads)",
    )
    parser.epilog = """\
examples:
  torch-dimap prune swin.pth swin_55.safetensors --amount 0.55
  torch-dimap prune model.safetensors.index.json half.safetensors --amount 50% --compressed
  torch-dimap prune swin_folder swin_folder_half --amount qkv=0.3 mlp=0.5

Of a folder, OUT is a new folder with all that is in IN but weights in other forms.
It needs no model, and so cannot refit the kept weights on images, which takes one: that is
torch_dimap.reconstruct(model, batches), or examples/prune_timm.py --images DIR --reconstruct N."""


def prune(arguments: argparse.Namespace) -> str:
    """Prune a file, and tell what was written and where the groups were cut."""
    thresholds = prune_checkpoint(
        arguments.source,
        arguments.target,
        _joined(arguments.amount, arguments.source),
        compressed=arguments.compressed,
        force=arguments.force,
        progress=sys.stderr.isatty(),
    )
    listed = ", ".join(f"{group} {threshold:.3e}" for group, threshold in thresholds.items())
    return f"{_written(arguments)}; thresholds: {listed}"


def add_expand(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``expand``."""
    _add_files(parser)
    parser.epilog = """\
examples:
  torch-dimap expand half.safetensors whole.safetensors
  torch-dimap expand masked_folder folder        for transformers' from_pretrained"""


def expand(arguments: argparse.Namespace) -> str:
    """Expand a file, and tell what was written."""
    expand_checkpoint(
        arguments.source,
        arguments.target,
        force=arguments.force,
        progress=sys.stderr.isatty(),
    )
    return _written(arguments)


def add_inspect(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``inspect``."""
    parser.add_argument("source", metavar="FILE", help=SOURCE)
    parser.epilog = "example:\n  torch-dimap inspect half.safetensors"


def inspect(arguments: argparse.Namespace) -> str:
    """Return what a file tells."""
    return inspect_checkpoint(arguments.source)


def _add_files(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="IN", help=SOURCE)
    parser.add_argument(
        "target",
        metavar="OUT",
        help="the safetensors file to write, or of a folder a new folder; it appears when it is "
        "whole",
    )
    parser.add_argument("--force", action="store_true", help="replace OUT if it exists")


def amount_of(text: str) -> float:
    """Tell a number of weights or units from a fraction by its point or percent sign."""
    if text.endswith("%"):
        return float(text[:-1]) / 100
    return int(text) if text.lstrip("+-").isdigit() else float(text)


def named_amount(text: str) -> tuple[str, float]:
    """Read ``group=amount``, or an amount for all groups, whose name is then empty."""
    group, _, amount = text.rpartition("=")
    return group, amount_of(amount)


def _joined(amounts: Sequence[tuple[str, float]], source: str) -> float | dict[str, float]:
    """Make one amount for prune_checkpoint of those on the command line."""
    named = dict(amounts)
    if len(named) < len(amounts) or "" in named and len(named) > 1:
        raise ValueError(
            "--amount must be one for all groups, or each group's once, such as qkv=0.3 mlp=0.5."
        )
    if "" in named:
        return named[""]
    with open_weights(source) as weights:
        return dict.fromkeys(group_names(weights.entries), 0.0) | named


def _written(arguments: argparse.Namespace) -> str:
    target = Path(arguments.target)
    files = target.rglob("*") if target.is_dir() else [target]
    return f"{target}: {sum(file.stat().st_size for file in files):,} bytes"

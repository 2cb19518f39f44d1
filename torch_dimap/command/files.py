"""The commands that work on files: ``prune``, ``expand`` and ``inspect``."""

from __future__ import annotations

import argparse
import os
import sys

from torch_dimap.files import expand_checkpoint, inspect_checkpoint, prune_checkpoint

SOURCE = """\
a .safetensors file, an index of shards (*.safetensors.index.json), or what torch.save
wrote; no code in it is run"""


def add_prune(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``prune``."""
    _add_files(parser)
    parser.add_argument(
        "--amount",
        type=_amount,
        required=True,
        metavar="A",
        help="how much goes: with a point, the fraction of every group (0.55); without, the "
        "number of weights in all (40000000)",
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
  torch-dimap prune model.safetensors.index.json half.safetensors --amount 0.5 --compressed

It needs no model, and so cannot refit the kept weights on images, which takes one: that is
torch_dimap.reconstruct(model, batches), or examples/prune_timm.py --images DIR --reconstruct N."""


def prune(arguments: argparse.Namespace) -> str:
    """Prune a file, and tell what was written and where the groups were cut."""
    thresholds = prune_checkpoint(
        arguments.source,
        arguments.target,
        arguments.amount,
        compressed=arguments.compressed,
        force=arguments.force,
        progress=sys.stderr.isatty(),
    )
    listed = ", ".join(f"{group} {threshold:.3e}" for group, threshold in thresholds.items())
    return f"{_written(arguments)}; thresholds: {listed}"


def add_expand(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``expand``."""
    _add_files(parser)
    parser.epilog = "example:\n  torch-dimap expand half.safetensors whole.safetensors"


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
        "target", metavar="OUT", help="the safetensors file to write; it appears when it is whole"
    )
    parser.add_argument("--force", action="store_true", help="replace OUT if it exists")


def _amount(text: str) -> float:
    """Tell a number of weights from a fraction by its point."""
    return int(text) if text.lstrip("+-").isdigit() else float(text)


def _written(arguments: argparse.Namespace) -> str:
    return f"{arguments.target}: {os.path.getsize(arguments.target):,} bytes"

"""The command line: ``torch-dimap COMMAND``, or ``python -m torch_dimap COMMAND``."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch_dimap import __version__
from torch_dimap.accounting import Summary, summarize
from torch_dimap.command import files as file_commands
from torch_dimap.command.models import add_source, image_for, open_model, read_weights
from torch_dimap.command.slim import add_slim, slim
from torch_dimap.command.table1 import PAPER, table1, table1_cells
from torch_dimap.files import skeleton
from torch_dimap.text import aligned, markdown


class Command(NamedTuple):
    """One subcommand: an entry in ``COMMANDS``."""

    help: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], str]  # returns what goes to the standard output


def _summarize_arguments(parser: argparse.ArgumentParser) -> None:
    add_source(parser)
    parser.add_argument("--no-flops", action="store_true", help="count weights only")
    parser.add_argument(
        "--format", choices=FORMATS, default="text", help="of the table (default: %(default)s)"
    )


FORMATS: dict[str, Callable[[Summary], str]] = {
    "text": str,
    "markdown": Summary.to_markdown,
    "csv": lambda summary: summary.to_csv().rstrip("\n"),
    "json": lambda summary: json.dumps(summary.to_dict(), indent=2),
}


def _summarize(arguments: argparse.Namespace) -> str:
    source = arguments.source
    if os.path.exists(source) and not arguments.model and not arguments.pretrained:
        for option in ("num_classes", "img_size", "no_flops"):
            if getattr(arguments, option):
                raise ValueError(
                    f"--{option.replace('_', '-')} goes with a model: add --model NAME to say of "
                    f"which model the weights in {source} are."
                )
        return FORMATS[arguments.format](summarize(skeleton(read_weights(source))))
    model = open_model(arguments)
    inputs = None if arguments.no_flops else image_for(model, arguments)
    return FORMATS[arguments.format](
        summarize(model, inputs, progress=sys.stderr.isatty())
    )


def _table1_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--sizes", nargs="+", choices=PAPER, default=list(PAPER), help="(default: all)"
    )
    parser.add_argument(
        "--pretrained",
        action="store_true",
        help="use timm's ImageNet-1K weights, downloaded unless cached (default: random)",
    )
    parser.add_argument("--markdown", action="store_true", help="print a Markdown table")


TABLE1_NOTE = """\
ours: counted here, with {weights} weights. paper: as printed there.
FLOPs are multiply-adds. uniform, the paper's convention: amount x FLOPs of the prunable
layers, whatever the weights. masked: every layer weighted by its own density, which
depends on the weights{caution}; the paper has no such number.
Savings are theoretical: dense kernels do not run faster on zeros."""


def _table1(arguments: argparse.Namespace) -> str:
    cells = table1_cells(table1(arguments.sizes, arguments.pretrained))
    table = markdown(cells, left=2) if arguments.markdown else "\n".join(aligned(cells, left=2))
    note = TABLE1_NOTE.format(
        weights="timm's ImageNet-1K" if arguments.pretrained else "random",
        caution="" if arguments.pretrained else ", and random ones tell little of trained ones",
    )
    return f"{table}\n\n{note}"


COMMANDS = {
    "prune": Command(
        "prune the weights in a file, without their model",
        file_commands.add_prune,
        file_commands.prune,
    ),
    "slim": Command(
        "remove whole heads and neurons from a model, so that it runs faster",
        add_slim,
        slim,
    ),
    "expand": Command(
        "write a file with masks as one with whole tensors, zeros in them",
        file_commands.add_expand,
        file_commands.expand,
    ),
    "inspect": Command(
        "tell the groups, densities, thresholds and sizes of a file",
        file_commands.add_inspect,
        file_commands.inspect,
    ),
    "summarize": Command(
        "tell what pruning has left, by layer, by group and in all",
        _summarize_arguments,
        _summarize,
    ),
    "table1": Command(
        "count the models of the paper's Table 1 beside its numbers",
        _table1_arguments,
        _table1,
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: arguments without the program's name. Default: those of the process.

    Returns:
        The exit code: 0, or 1 after an error, told in one line on the standard error.
        Arguments that cannot be parsed exit with 2, as usual with argparse.
    """
    parser = argparse.ArgumentParser(
        prog="torch-dimap",
        description="Data-independent module-aware pruning (DIMAP) of vision transformers.",
    )
    parser.add_argument("--version", action="version", version=f"torch_dimap {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, command in COMMANDS.items():
        command.add_arguments(
            commands.add_parser(
                name,
                help=command.help,
                description=command.help,
                formatter_class=argparse.RawDescriptionHelpFormatter,
            )
        )
    arguments = parser.parse_args(argv)
    try:
        print(COMMANDS[arguments.command].run(arguments))
    except Exception as error:  # a model's own code raises what it likes; the user gets one line
        print(f"{parser.prog} {arguments.command}: error: {_one_line(error)}", file=sys.stderr)
        return 1
    return 0


def _one_line(error: Exception) -> str:
    text = str(error)
    if isinstance(error, OSError) and error.strerror:  # without its number
        text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return " ".join(text.split()) or type(error).__name__

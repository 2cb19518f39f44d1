"""Prune any timm Swin in one shot and write the baked model as safetensors.

    python examples/prune_timm.py swin_tiny_patch4_window7_224 --amount 0.55 --pretrained \\
        --output swin_tiny_55.safetensors
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import timm
import torch
from safetensors.torch import save_file
from torch import nn

import torch_dimap


def load_model(options: argparse.Namespace) -> nn.Module:
    """Build the model with the weights that were asked for, or say why that is not possible."""
    if not timm.is_model(options.model):
        close = timm.list_models(f"*{options.model.split('_')[0]}*")[:3]
        sys.exit(
            f"prune_timm: timm knows no model {options.model!r}"
            + (f"; there are {', '.join(close)}." if close else ".")
        )
    if options.random_init:
        print("Weights: random. The table is about sizes only; accuracy means nothing.")
        return timm.create_model(options.model)
    try:
        if options.checkpoint:
            return timm.create_model(options.model, checkpoint_path=str(options.checkpoint))
        return timm.create_model(options.model, pretrained=True)
    except Exception as error:  # timm, the hub and torch raise many kinds for lack of a file
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        sys.exit(
            f"prune_timm: no weights for {options.model}: {reason}\n"
            "Give a file with --checkpoint, or --random-init to go on with random weights."
        )


def save_whole_or_not_at_all(model: nn.Module, path: Path) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save_file({key: value.contiguous() for key, value in model.state_dict().items()}, temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", metavar="MODEL", help="a timm name")
    parser.add_argument("--amount", type=float, required=True, metavar="A",
                        help="the fraction of the prunable weights to remove, 0 to 1")  # fmt: skip
    weights = parser.add_mutually_exclusive_group(required=True)
    weights.add_argument("--pretrained", action="store_true", help="timm's weights, downloaded")
    weights.add_argument("--checkpoint", type=Path, metavar="FILE", help="weights on disk")
    weights.add_argument("--random-init", action="store_true", help="random weights, to try out")
    parser.add_argument("--output", type=Path, metavar="FILE", help="the baked model")
    return parser.parse_args(arguments)


def main() -> None:
    options = parse()
    if not 0 <= options.amount <= 1:
        sys.exit(f"prune_timm: --amount must lie between 0 and 1, found {options.amount}.")
    if options.checkpoint and not options.checkpoint.is_file():
        sys.exit(f"prune_timm: there is no file {options.checkpoint}.")
    if options.output and not options.output.resolve().parent.is_dir():
        sys.exit(f"prune_timm: there is no folder {options.output.resolve().parent}.")
    model = load_model(options)
    try:
        groups = torch_dimap.group_parameters(model)
    except ValueError as error:
        sys.exit(f"prune_timm: {error}")
    thresholds = torch_dimap.global_module_aware_unstructured(groups, amount=options.amount)
    size = timm.data.resolve_model_data_config(model)["input_size"]
    print(torch_dimap.summarize(model, torch.zeros(1, *size), thresholds=thresholds))
    if options.output:
        save_whole_or_not_at_all(torch_dimap.remove_all(model), options.output)
        print(f"Baked model: {options.output} ({options.output.stat().st_size / 1e6:.1f} MB)")


if __name__ == "__main__":
    main()

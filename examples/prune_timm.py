"""Prune any timm Swin in one shot and write the baked model as safetensors.

    python examples/prune_timm.py swin_tiny_patch4_window7_224 --amount 0.55 --pretrained \\
        --output swin_tiny_55.safetensors
"""

from __future__ import annotations

import argparse
from pathlib import Path

import timm
import torch
from models import add_weights_arguments, fail, load_model, save_model

import torch_dimap


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", metavar="MODEL", help="a timm name")
    parser.add_argument("--amount", type=float, required=True, metavar="A",
                        help="the fraction of the prunable weights to remove, 0 to 1")  # fmt: skip
    add_weights_arguments(parser)
    parser.add_argument("--output", type=Path, metavar="FILE", help="the baked model")
    return parser.parse_args(arguments)


def main() -> None:
    options = parse()
    if not 0 <= options.amount <= 1:
        fail(f"--amount must lie between 0 and 1, found {options.amount}.")
    if options.output and not options.output.resolve().parent.is_dir():
        fail(f"there is no folder {options.output.resolve().parent}.")
    model = load_model(options.model, pretrained=options.pretrained, checkpoint=options.checkpoint)
    if options.random_init:
        print("Weights: random. The table is about sizes only; accuracy means nothing.")
    try:
        groups = torch_dimap.group_parameters(model)
    except ValueError as error:
        fail(str(error))
    thresholds = torch_dimap.global_module_aware_unstructured(groups, amount=options.amount)
    size = timm.data.resolve_model_data_config(model)["input_size"]
    print(torch_dimap.summarize(model, torch.zeros(1, *size), thresholds=thresholds))
    if options.output:
        try:
            save_model(torch_dimap.remove_all(model), options.output)
        except OSError as error:
            fail(str(error))
        print(f"Baked model: {options.output} ({options.output.stat().st_size / 1e6:.1f} MB)")


if __name__ == "__main__":
    main()

"""Prune any timm Swin in one shot and write the baked model as safetensors.

    python examples/prune_timm.py swin_tiny_patch4_window7_224 --amount 0.55 --pretrained \\
        --output swin_tiny_55.safetensors
    python examples/prune_timm.py ... --images FOLDER --reconstruct 256   refits what is kept
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import timm
import torch
from images import read_image
from models import add_weights_arguments, fail, load_model, save_model
from torch import Tensor, nn
from torchvision.datasets.folder import IMG_EXTENSIONS

import torch_dimap

BATCH = 32


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", metavar="MODEL", help="a timm name")
    parser.add_argument("--amount", type=float, required=True, metavar="A",
                        help="the fraction of the prunable weights to remove, 0 to 1")  # fmt: skip
    add_weights_arguments(parser)
    parser.add_argument("--images", type=Path, metavar="DIR",
                        help="images of any kind that the model is for, in any subfolders")
    parser.add_argument("--reconstruct", type=int, default=0, metavar="N",
                        help="refit the kept weights on N of the images (default: 0)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="the baked model")
    options = parser.parse_args(arguments)
    if bool(options.images) != (options.reconstruct > 0) or options.reconstruct < 0:
        parser.error("--images and --reconstruct, a number of images, go together")
    return options


def find_images(folder: Path) -> list[Path]:
    """List the image files in a folder and in those inside it."""
    found = sorted(
        p for p in folder.rglob("*") if p.suffix.lower() in IMG_EXTENSIONS and p.is_file()
    )
    if not found:
        fail(f"there are no images in {folder}.")
    return found


def read_some(images: list[Path], count: int, transform: Callable) -> list[Tensor]:
    """Read some of the images, in batches."""
    chosen = random.Random(0).sample(images, min(count, len(images)))
    try:
        return [
            torch.stack([transform(read_image(str(path))) for path in chosen[i : i + BATCH]])
            for i in range(0, len(chosen), BATCH)
        ]
    except OSError as error:
        fail(str(error))


def reconstruct(model: nn.Module, batches: list[Tensor]) -> None:
    """Refit the kept weights on images, and tell what that did."""
    try:
        misfits = torch_dimap.reconstruct(model, batches, progress=sys.stderr.isatty())
    except (ValueError, RuntimeError) as error:
        fail(str(error))
    before, after = (statistics.mean(x) for x in zip(*misfits.values()))
    print(f"Reconstructed on {sum(map(len, batches))} images: the outputs of a layer were off by "
          f"{before:.1%} of their norm, and are by {after:.1%} (means over layers).")  # fmt: skip


def main() -> None:
    options = parse()
    if not 0 <= options.amount <= 1:
        fail(f"--amount must lie between 0 and 1, found {options.amount}.")
    if options.output and not options.output.resolve().parent.is_dir():
        fail(f"there is no folder {options.output.resolve().parent}.")
    images = find_images(options.images) if options.images else []
    model = load_model(options.model, pretrained=options.pretrained, checkpoint=options.checkpoint)
    if options.random_init:
        print("Weights: random. The table is about sizes only; accuracy means nothing.")
    try:
        groups = torch_dimap.group_parameters(model)
    except ValueError as error:
        fail(str(error))
    config = timm.data.resolve_model_data_config(model)
    transform = timm.data.create_transform(**config, is_training=False)
    batches = read_some(images, options.reconstruct, transform)
    thresholds = torch_dimap.global_module_aware_unstructured(groups, amount=options.amount)
    if batches:
        reconstruct(model, batches)
    image = torch.zeros(1, *config["input_size"])
    print(torch_dimap.summarize(model, image, thresholds=thresholds))
    if options.output:
        try:
            save_model(torch_dimap.remove_all(model), options.output)
        except OSError as error:
            fail(str(error))
        print(f"Baked model: {options.output} ({options.output.stat().st_size / 1e6:.1f} MB)")


if __name__ == "__main__":
    main()

"""The options of xpruner.py, and which of its files each of them shapes."""

from __future__ import annotations

import argparse
from pathlib import Path

from images import AUGMENTATIONS, add_data_arguments
from models import add_model_kwargs_argument, add_weights_arguments
from timm.utils import ParseKwargs
from unit_scores import SCORES

# The options that each step's file is made with; a step's file needs those of the steps before.
EVERY = ("model", "model_kwargs", "pretrained", "checkpoint", "random_init", "dataset", "seed",
         "batch_size", "accumulate", "augmentation", "scale", "smoothing", "weight_decay", "amp",
         "train_split", "test_split", "data_kwargs")  # fmt: skip
OWN = {
    "masks": ("mask_epochs", "mask_lr", "penalties"),
    "rates": ("target", "scores", "classes", "rates", "rate_epochs", "rate_lr", "threshold_lr",
              "beta", "eta"),
    "tune": ("tune_epochs", "tune_lr"),
}  # fmt: skip
PRODUCTS = {"masks": "masks.safetensors", "rates": "pruned.safetensors", "tune": "slim.safetensors"}


def parse(description: str, words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help="a timm name")
    add_weights_arguments(parser)
    add_model_kwargs_argument(parser)
    add_data_arguments(parser)
    add("--output", type=Path, required=True, metavar="DIR", help="the folder of all files")
    add("--step", choices=["all", *OWN], default="all", help="(default: all)")
    add("--resume", action="store_true", help="go on in DIR, where the same command stopped")
    add("--target", type=float, default=0.6, metavar="A",
        help="the share of the multiply-adds to keep, 0 to 1 (default: 0.6)")
    add("--classes", type=int, nargs="+", metavar="C",
        help="prune and tune for these classes alone, by their numbers (default: all)")
    add("--mask-epochs", type=int, default=20, metavar="N", help="(default: 20)")
    add("--mask-lr", type=float, default=1e-2, metavar="LR", help="(default: 1e-2)")
    add("--penalties", nargs="*", action=ParseKwargs, default={"squares": 1e-4},
        metavar="NAME=W", help="on the masks: squares, norms, unit_laplacian, class_difference, "
        "class_mean, with their weights (default: squares=1e-4)")
    add("--scores", choices=["masks", "all_masks", *SCORES], default="masks",
        help="what ranks the units: masks, of --classes; all_masks, of all classes; the others "
        "are to compare with (default: masks)")
    add("--rates", choices=["learned", "layer", "kind"], default="learned",
        help="learned, or without training one rate for every layer or one ranking of each kind "
        "of unit (default: learned)")
    add("--rate-epochs", type=int, default=20, metavar="N",
        help="at most; learned rates that stand still end the step (default: 20)")
    add("--rate-lr", type=float, default=5e-4, metavar="LR", help="of weights (default: 5e-4)")
    add("--threshold-lr", type=float, default=0.05, metavar="LR", help="(default: 0.05)")
    add("--beta", type=float, default=20.0, metavar="B",
        help="the weight of the squared distance from the target (default: 20)")
    add("--eta", type=float, default=0.05, metavar="E",
        help="the step of the multiplier that holds the target (default: 0.05)")
    add("--tune-epochs", type=int, default=10, metavar="N", help="(default: 10)")
    add("--tune-lr", type=float, default=5e-4, metavar="LR", help="the first (default: 5e-4)")
    add("--weight-decay", type=float, default=1e-8, metavar="W", help="(default: 1e-8)")
    add("--accumulate", type=int, default=1, metavar="N",
        help="forward passes per optimizer step (default: 1)")
    add("--augmentation", choices=AUGMENTATIONS, default="swin",
        help="mixup and CutMix, of swin, stay off in the first step (default: swin)")
    add("--scale", type=float, default=0.08, metavar="S",
        help="the smallest share of an image that a random crop takes (default: 0.08)")
    add("--smoothing", type=float, default=0.1, metavar="S", help="of labels (default: 0.1)")
    add("--probe-images", type=int, default=2000, metavar="N",
        help="test images for the tests of faithfulness; 0 leaves them out (default: 2000)")
    add("--seed", type=int, default=0, help="(default: 0)")
    options = parser.parse_args(words)
    if not 0 < options.target < 1:
        parser.error(f"--target must lie between 0 and 1, found {options.target}")
    if min(options.mask_epochs, options.rate_epochs, options.batch_size, options.accumulate) < 1:
        parser.error("--mask-epochs, --rate-epochs, --batch-size and --accumulate must be at "
                     "least 1")  # fmt: skip
    if min(options.tune_epochs, options.probe_images) < 0:
        parser.error("--tune-epochs and --probe-images must be 0 or more")
    if options.augmentation == "swin" and options.batch_size % 2:
        parser.error(f"--batch-size must be even for mixup, found {options.batch_size}")
    return options


def free_of(step: str, options: argparse.Namespace) -> set[str]:
    """Name the options that a step's files do not depend on."""
    steps = list(OWN)[: list(OWN).index(step) + 1]
    return set(vars(options)) - {*EVERY, *(name for before in steps for name in OWN[before])}


def needs_masks(options: argparse.Namespace) -> bool:
    return options.scores in ("masks", "all_masks")

"""Labelled images for training and testing, on timm's transforms."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import timm
import torch
from models import fail
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from timm.utils import ParseKwargs
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Subset
from torchvision.datasets import ImageFolder

DIGITS = "digits"  # in place of a folder
AMP = {"none": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
AUGMENTATIONS = {
    "swin": {  # colour jitter, AutoAugment, random erasing; mixup and CutMix come by batch
        "color_jitter": 0.4,
        "auto_augment": "rand-m9-mstd0.5-inc1",
        "re_prob": 0.25,
        "re_mode": "pixel",
    },
    "light": {"color_jitter": 0.0},  # random crops and flips
    "none": {"no_aug": True},
}


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--data", required=True, metavar="DIR",
        help="an image folder, DIR/SPLIT/CLASS/IMAGE; with --dataset, where that is kept; or "
        "digits, the handwritten ones that come with scikit-learn")
    add("--dataset", metavar="NAME",
        help="a timm data set, such as torch/cifar10 or hfds/ORG/NAME, instead of a folder")
    add("--train-split", default="train", metavar="SPLIT", help="(default: train)")
    add("--test-split", default="validation", metavar="SPLIT", help="(default: validation)")
    add_loading_arguments(parser)


def add_loading_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--data-kwargs", nargs="*", default={}, action=ParseKwargs, metavar="KEY=VALUE",
        help="for timm.data.resolve_data_config, such as crop_pct=1.0")
    add("--batch-size", type=int, default=128, metavar="N",
        help="images per process and forward (default: 128)")
    add("--workers", type=int, default=2, metavar="N", help="loader processes (default: 2)")
    add("--device", choices=["cuda", "cpu"],
        default="cuda" if torch.cuda.is_available() else "cpu", help="(default: what is there)")
    add("--amp", choices=AMP, default="bfloat16", help="autocast's dtype (default: bfloat16)")


def read_image(path: str) -> Image.Image:
    """Read an image file, or say which one cannot be read."""
    try:
        with open(path, "rb") as file:
            return Image.open(file).convert("RGB")
    except Exception as error:  # Pillow raises many kinds for a damaged file
        raise OSError(f"cannot read the image {path}: {error}") from error


class Digits(Dataset):
    """A part of scikit-learn's 1797 handwritten digits of 8 x 8: nothing is downloaded."""

    classes = [str(digit) for digit in range(10)]
    class_to_idx = {name: i for i, name in enumerate(classes)}
    transform: Callable

    def __init__(self, train: bool) -> None:
        digits = load_digits()
        parts = train_test_split(
            digits.images, digits.target, test_size=0.3, random_state=0, stratify=digits.target
        )
        self.images = [grey_picture(image) for image in parts[0 if train else 1]]
        self.targets = parts[2 if train else 3].tolist()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return self.transform(self.images[i]), self.targets[i]


def grey_picture(pixels: np.ndarray) -> Image.Image:
    """Make a picture of pixels between 0 and 16."""
    return Image.fromarray((pixels * 15).astype(np.uint8)).convert("RGB")


def open_split(options: argparse.Namespace, split: str) -> Dataset:
    """Return a split of the data that the command line names, or say what is wrong with it."""
    if options.dataset:
        try:
            return timm.data.create_dataset(options.dataset, root=options.data, split=split)
        except Exception as error:  # each kind of data set raises its own
            fail(f"cannot open the split {split!r} of {options.dataset}: {error}")
    if options.data == DIGITS:
        return Digits(train=split == options.train_split)
    folder = Path(options.data, split)
    if not folder.is_dir():
        found = sorted(p.name for p in Path(options.data).glob("*/"))
        fail(f"there is no folder {folder}; {options.data} holds {', '.join(found) or 'none'}.")
    try:
        return ImageFolder(str(folder), loader=read_image)
    except FileNotFoundError as error:  # no classes, or one without images
        fail(f"{folder}: {error}")


def open_splits(options: argparse.Namespace) -> tuple[Dataset, Dataset, int]:
    """Return the training and the test data and the number of their classes."""
    train, test = (open_split(options, s) for s in (options.train_split, options.test_split))
    classes = [getattr(getattr(data, "reader", data), "class_to_idx", None)
               for data in (train, test)]  # fmt: skip
    if None in classes:
        fail(f"{options.dataset} does not name its classes: write it as an image folder.")
    if classes[0] != classes[1]:
        odd = sorted(set(classes[0]) ^ set(classes[1]))[:3]
        fail(
            f"{options.train_split} and {options.test_split} must hold the same classes, "
            f"found {len(classes[0])} and {len(classes[1])}; in one alone: {', '.join(odd)}."
        )
    return train, test, len(classes[0])


def only_classes(data: Dataset, classes: list[int]) -> Dataset:
    """Return the images of some classes."""
    targets = getattr(data, "targets", None)
    if targets is None:
        fail("--classes needs a data set that lists its labels: write it as an image folder.")
    wrong = sorted(set(classes) - set(targets))
    if wrong:
        fail(f"--classes must be among the {len(set(targets))} of the data, found {wrong[0]}.")
    return Subset(data, [i for i, target in enumerate(targets) if target in set(classes)])


def set_transforms(
    train: Dataset,
    test: Dataset,
    model: nn.Module,
    options: argparse.Namespace,
    augmentation: str = "none",
    scale: float = 0.08,
) -> None:
    """Give both splits timm's transforms for the model."""
    config = timm.data.resolve_data_config({**options.model_kwargs, **options.data_kwargs},
                                           model=model)  # fmt: skip
    common = {key: config[key] for key in ("input_size", "interpolation", "mean", "std")}
    train.transform = timm.data.create_transform(
        **common, is_training=True, scale=(scale, 1.0), **AUGMENTATIONS[augmentation]
    )
    test.transform = timm.data.create_transform(
        **common, crop_pct=config["crop_pct"], crop_mode=config["crop_mode"]
    )


def seed_worker(_: int) -> None:
    np.random.seed(torch.initial_seed() % 2**32)


def training_loader(
    data: Dataset, options: argparse.Namespace, rank: int = 0, world: int = 1
) -> DataLoader:
    """Load shuffled batches: over all processes the same images in every step, however many."""
    sampler = DistributedSampler(data, world, rank, seed=options.seed, drop_last=True)
    return DataLoader(
        data, options.batch_size, sampler=sampler, drop_last=True, num_workers=options.workers,
        worker_init_fn=seed_worker, pin_memory=options.device == "cuda",
    )  # fmt: skip


def test_loader(
    data: Dataset, options: argparse.Namespace, rank: int = 0, world: int = 1
) -> DataLoader:
    """Load this process's share of the test images, in order."""
    share = Subset(data, range(rank, len(data), world))
    return DataLoader(
        share, options.batch_size, num_workers=options.workers, pin_memory=options.device == "cuda"
    )


def unlabelled_batches(
    images: Dataset, count: int, batch_size: int, transform: Callable, seed: int
) -> list[Tensor]:
    """Return a random choice of a data set's images in batches, as a model under test sees them."""
    images = copy.copy(images)
    images.transform = transform
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(images), generator=generator)[:count].tolist()
    return list(torch.stack([images[i][0] for i in chosen]).split(batch_size))


def foreign_batches(kind: str, like: list[Tensor], transform: Callable) -> list[Tensor]:
    """Return as many images of another kind: noise, or scikit-learn's handwritten digits."""
    generator = torch.Generator().manual_seed(0)
    if kind == "noise":
        return [torch.randn(batch.shape, generator=generator) for batch in like]
    digits = load_digits().images
    count = sum(map(len, like))
    chosen = torch.randint(len(digits), (count,), generator=generator).tolist()
    pictures = [grey_picture(digits[i]) for i in chosen]
    return list(torch.stack([transform(x) for x in pictures]).split(len(like[0])))


def autocast(options: argparse.Namespace) -> torch.autocast:
    return torch.autocast(options.device, AMP[options.amp], enabled=options.amp != "none")


def count_correct(
    model: nn.Module, loader: DataLoader, options: argparse.Namespace, forwards: int = 0
) -> int:
    """Return how many of the loader's images the model puts first in their class.

    Processes that share the weights of a sharded model must all make as many ``forwards``.
    """
    answers = answers_of(model, loader, options, forwards)
    return sum(int((outputs.argmax(1) == labels).sum()) for outputs, labels in answers)


@torch.no_grad()
def answers_of(
    model: nn.Module, loader: DataLoader, options: argparse.Namespace, forwards: int = 0
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the model's outputs for each of the loader's batches, and the batch's labels."""
    model.eval()
    for images, labels in loader:
        with autocast(options):
            outputs = model(images.to(options.device, non_blocking=True))
        yield outputs, labels.to(options.device)
    for _ in range(forwards - len(loader)):
        model(images.to(options.device))

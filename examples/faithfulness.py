"""Do class masks say what units do? Tests of them as an explanation."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from images import autocast
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm import tqdm

from torch_dimap.learning import ClassMasks, gated
from torch_dimap.units import UnitLayer

SHARES = (0.02, 0.05, 0.1)
RANDOM_DRAWS = 5


class Mean(NamedTuple):
    """A mean and its standard error."""

    mean: float
    error: float

    def __str__(self) -> str:
        return f"{self.mean:.1f} ± {self.error:.1f}"


def mean_of(values: Tensor) -> Mean:
    error = float(values.std()) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return Mean(float(values.mean()), error)


def probe_loader(data: Dataset, options: argparse.Namespace) -> DataLoader:
    """Load as many test images as the tests are made with, spread over all."""
    chosen = range(0, len(data), max(1, -(-len(data) // options.probe_images)))
    return DataLoader(Subset(data, chosen), options.batch_size, num_workers=options.workers)


@torch.no_grad()
def predictions(
    model: nn.Module, loader: DataLoader, options: argparse.Namespace
) -> tuple[Tensor, Tensor]:
    """Return the predicted and the right classes."""
    found, right = [], []
    for images, labels in loader:
        with autocast(options):
            found.append(model(images.to(options.device)).argmax(1).cpu())
        right.append(labels)
    return torch.cat(found), torch.cat(right)


@torch.no_grad()
def leakage(
    model: nn.Module, masks: ClassMasks, loader: DataLoader, options: argparse.Namespace
) -> dict[str, float]:
    """Feed the masks labels, and see how far the predictions follow them.

    Args:
        model: with the masks on it, in evaluation mode.
        masks: the masks.
        loader: test images.
        options: device and autocast.

    Returns:
        In percent: how often the prediction is right when the masks get the right label,
        which is no accuracy; and how often it is a label drawn at random that they got, beside
        what that would be by chance.
    """
    generator = torch.Generator().manual_seed(options.seed)
    own = follows = count = 0
    for images, labels in loader:
        images = images.to(options.device)
        drawn = torch.randint(masks.num_classes, labels.shape, generator=generator)
        for given in (labels, drawn):
            with masks.labels(given), autocast(options):
                hits = int((model(images).argmax(1).cpu() == given).sum())
            own, follows = (own + hits, follows) if given is labels else (own, follows + hits)
        count += len(labels)
    return {"fed the right label, is right": 100 * own / count,
            "fed a random label, follows it": 100 * follows / count,
            "chance": 100 / masks.num_classes}  # fmt: skip


def most_important(scores: dict[UnitLayer, Tensor], share: float) -> dict[UnitLayer, Tensor]:
    """Return one flag per unit: among the highest of its kind in the whole model?"""
    chosen = {}
    for kind in {layer.kind for layer in scores}:
        layers = [layer for layer in scores if layer.kind == kind]
        together = torch.cat([scores[layer].cpu() for layer in layers])
        flags = torch.zeros(len(together), dtype=torch.bool)
        flags[together.topk(max(1, round(share * len(together)))).indices] = True
        chosen.update(zip(layers, flags.split([layer.units for layer in layers])))
    return chosen


def accuracy_by_class(
    model: nn.Module, gone: dict[UnitLayer, Tensor], loader: DataLoader,
    options: argparse.Namespace, classes: int,
) -> Tensor:  # fmt: skip
    """Return the percentage of right predictions of each class, without some units."""
    keep = {layer: (~flags).float().to(options.device) for layer, flags in gone.items()}
    with gated({layer: keep[layer].clone for layer in keep}):
        found, right = predictions(model, loader, options)
    hits = torch.zeros(classes).index_add(0, right, (found == right).float())
    return 100 * hits / torch.bincount(right, minlength=classes).clamp(min=1)


def deletion(
    model: nn.Module, masks: ClassMasks, loader: DataLoader, options: argparse.Namespace
) -> list[dict]:
    """Delete the units that the masks call most important for one class at a time.

    A unit's importance for class c is ``masks.scores([c])`` (*for the class*), or that less
    its mean over the classes (*more than for others*); over all classes it is blind to c, and
    random units know nothing. The shares are of the heads and of the neurons of the model;
    nothing is retrained.

    Args:
        model: without masks on it, in evaluation mode.
        masks: which were learned on it.
        loader: test images of all classes.
        options: device, autocast and seed.

    Returns:
        A row for each share, order and class: by how many points the accuracy on the class
        fell, and that on the others.
    """
    classes = masks.num_classes
    by_class = [masks.scores([c]) for c in range(classes)]
    mean = {layer: values / classes for layer, values in masks.scores().items()}
    contrast = [{layer: own[layer] - mean[layer] for layer in mean} for own in by_class]
    generator = torch.Generator().manual_seed(options.seed)
    draws = [
        {layer: torch.rand(layer.units, generator=generator) for layer in mean}
        for _ in range(RANDOM_DRAWS)
    ]
    orders = {"for the class": by_class, "more than for others": contrast,
              "for all classes": [mean], "random": draws}  # fmt: skip
    dense = accuracy_by_class(model, {}, loader, options, classes)
    rows = []
    runs = len(SHARES) * sum(map(len, orders.values()))
    with tqdm(total=runs, unit="test", desc="deletion", leave=False) as bar:
        for share in SHARES:
            for order, scores in orders.items():
                falls = []
                for own in scores:
                    gone = most_important(own, share)
                    falls.append(dense - accuracy_by_class(model, gone, loader, options, classes))
                    bar.update()
                rows += [{"share": share, "order": order, "class": c, "own": own, "others": others}
                         for c, own, others in _falls(falls, classes, order)]  # fmt: skip
    return rows


def _falls(falls: list[Tensor], classes: int, order: str) -> Iterator[tuple[int, float, float]]:
    """Yield for each class by how much its accuracy fell, and that of the others on average."""
    known = len(falls) == classes and order not in ("for all classes", "random")
    for c in range(classes):
        fall = falls[c] if known else torch.stack(falls).mean(0)
        yield c, float(fall[c]), float((fall.sum() - fall[c]) / (classes - 1))


def summarize_deletion(rows: list[dict]) -> list[dict]:
    """Return for each share and order the means over classes, with standard errors.

    ``ahead`` is by how much further the class itself fell than with the order in question,
    when the units for the class are deleted: paired, class by class.
    """
    table = []
    for share, order in dict.fromkeys((row["share"], row["order"]) for row in rows):
        own, others = _column(rows, share, order, "own"), _column(rows, share, order, "others")
        ahead = _column(rows, share, "for the class", "own") - own
        table.append({"share": share, "order": order, "own": mean_of(own),
                      "others": mean_of(others), "difference": mean_of(own - others),
                      "ahead": mean_of(ahead)})  # fmt: skip
    return table


def _column(rows: list[dict], share: float, order: str, key: str) -> Tensor:
    return torch.tensor([r[key] for r in rows if (r["share"], r["order"]) == (share, order)])

"""Compare pruning methods in one shot: top-1 right after pruning, without fine-tuning.

Measures what Tables 3 and 4 of the paper report: the DIMAP score and its three modules
against uniform and global magnitude, one module, chance, a score that needs gradients of
labelled batches, and other groupings of the same layers.

    python examples/compare.py swin_tiny_patch4_window7_224 --pretrained --data imagenet

Give one checkpoint for each seed of training; the table then shows means, lowest and highest.
With --reconstruct 512 every model is also measured with its kept weights refitted on so many
training images, without their labels: layer after layer, and each layer for itself. A row
then says how many test images this gained and lost against one-shot, for paired tests.
Every row says how far the model is from the dense one, labels aside: for how many test images
both have the same answer, in %, and the mean Kullback-Leibler divergence, in nats.
Writes one_shot.csv (every measurement), one_shot.md and one_shot.png to --output.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import statistics
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from images import (
    add_data_arguments,
    answers_of,
    autocast,
    foreign_batches,
    open_splits,
    set_transforms,
    test_loader,
    training_loader,
    unlabelled_batches,
)
from methods import METHODS, SCORED, prune_to
from models import add_model_kwargs_argument, fail, load_model, whole_or_not_at_all
from provenance import provenance, write_csv
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm
from training import set_seeds

import torch_dimap

PANELS = {
    "scores and rankings": ("dimap", "single", "uniform", "global", "gradient"),
    "groupings of the DIMAP score": ("dimap", "single", "per type", "per stage", "per block"),
}

WAYS = {"order": "in order", "itself": "each for itself"}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help="a timm name")
    weights = parser.add_mutually_exclusive_group(required=True)
    weights.add_argument("--pretrained", action="store_true", help="timm's weights, downloaded")
    weights.add_argument("--checkpoints", type=Path, nargs="+", metavar="FILE",
                         help="weights on disk, a file for each seed")  # fmt: skip
    add_model_kwargs_argument(parser)
    add_data_arguments(parser)
    add("--amounts", type=float, nargs="+", default=[0.19, 0.28, 0.38, 0.5, 0.6], metavar="A",
        help="fractions of the prunable weights (default: 0.19 0.28 0.38 0.5 0.6)")
    add("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="NAME",
        help=f"of {', '.join(METHODS)} (default: all)")
    add("--reconstruct", type=int, nargs="*", default=[], metavar="N",
        help="also refit the kept weights, on each of these numbers of images")
    add("--damping", type=float, nargs="+", default=[0.01], metavar="D",
        help="of these refits (default: 0.01)")
    add("--ways", choices=WAYS, nargs="+", default=list(WAYS), metavar="WAY",
        help="to refit: order, itself (default: both)")
    add("--images", choices=["train", "noise", "digits"], default="train",
        help="what to refit on: noise and digits are the wrong images (default: train)")
    add("--gradient-batches", type=int, default=8, metavar="N",
        help="labelled training batches for the gradient score (default: 8)")
    add("--seed", type=int, default=0,
        help="of the labelled batches and of random pruning; counted up by file (default: 0)")
    add("--output", type=Path, default=Path("examples/results"), metavar="DIR",
        help="(default: examples/results)")
    options = parser.parse_args()
    if not all(0 <= amount <= 1 for amount in options.amounts):
        parser.error(f"--amounts must lie between 0 and 1, found {options.amounts}")
    if min(options.gradient_batches, options.batch_size, *options.reconstruct, 1) < 1:
        parser.error("--gradient-batches, --batch-size and --reconstruct must be at least 1")
    if min(options.damping) <= 0:
        parser.error(f"--damping must be above 0, found {options.damping}")
    return options


def gradient_scores(
    model: nn.Module, loader: DataLoader, options: argparse.Namespace
) -> dict[tuple[nn.Module, str], Tensor]:
    """Return |w * dL/dw| of every prunable weight, L being the loss of a few batches."""
    groups = torch_dimap.group_parameters(model)
    pairs = [pair for group in groups.values() for pair in group]
    model.eval()
    model.zero_grad()
    for images, labels in itertools.islice(loader, options.gradient_batches):
        with autocast(options):
            outputs = model(images.to(options.device))
        F.cross_entropy(outputs.float(), labels.to(options.device)).backward()
    weights = {(module, name): getattr(module, name) for module, name in pairs}
    return {pair: (w * w.grad).detach().abs() for pair, w in weights.items()}


def calibration(
    train: DataLoader, test: DataLoader, count: int, options: argparse.Namespace
) -> list[Tensor]:
    """Return unlabelled images, of the kind that the command line names."""
    transform = test.dataset.dataset.transform
    images = unlabelled_batches(train.dataset, count, options.batch_size, transform, options.seed)
    if options.images == "train":
        return images
    return foreign_batches(options.images, images, transform)


def reconstructed(
    pruned: nn.Module, train: DataLoader, test: DataLoader, options: argparse.Namespace
) -> Iterator[tuple[str, nn.Module]]:
    """Yield a pruned model as it is, then refitted in every way that is asked for."""
    yield "", pruned
    for count, damping, way in itertools.product(
        options.reconstruct, options.damping, options.ways
    ):
        model = copy.deepcopy(pruned)
        images = calibration(train, test, count, options)
        torch_dimap.reconstruct(model, images, sequential=way == "order", damping=damping)
        damped = f", damping {damping:g}" if options.damping != [0.01] else ""
        yield f", {WAYS[way]}, {count} images{damped}", model


def importance_scores(
    model: nn.Module, by: str, train: DataLoader, test: DataLoader, options: argparse.Namespace
) -> dict[tuple[nn.Module, str], Tensor] | None:
    """Return what a ranking needs beside the weights, if anything."""
    if by == "gradient":
        return gradient_scores(model, train, options)
    if by in SCORED:
        images = calibration(train, test, max(options.reconstruct, default=512), options)
        score = torch_dimap.wanda_scores if by == "wanda" else torch_dimap.sparsegpt_scores
        return score(model, images)
    return None


def compare(
    dense: nn.Module,
    train: DataLoader,
    test: DataLoader,
    options: argparse.Namespace,
    bar: tqdm,
) -> list[dict]:
    """Return a row for the dense model and one for every method and amount."""

    def answer(model: nn.Module) -> tuple[Tensor, Tensor]:
        """Return the logarithms of the probabilities, and which images the model gets right."""
        bar.update()
        batches = [
            (outputs.float().log_softmax(1), outputs.argmax(1) == labels)
            for outputs, labels in answers_of(model, test, options)
        ]
        logarithms, correct = zip(*batches)
        return torch.cat(logarithms), torch.cat(correct)

    def measures(logarithms: Tensor, correct: Tensor) -> dict[str, float]:
        same = logarithms.argmax(1) == reference.argmax(1)
        divergence = F.kl_div(logarithms, reference, reduction="batchmean", log_target=True)
        return {
            "top1": 100 * int(correct.sum()) / len(correct),
            "agreement": 100 * int(same.sum()) / len(correct),
            "divergence": round(float(divergence), 6),
        }

    reference, correct = answer(dense)
    rows: list[dict] = [{"method": "dense", "amount": 0.0, "parameters_removed": 0.0,
                         **measures(reference, correct)}]  # fmt: skip
    for method, amount in itertools.product(options.methods, options.amounts):
        pruned = copy.deepcopy(dense)
        set_seeds(options.seed)
        scores = importance_scores(pruned, METHODS[method][1], train, test, options)
        prune_to(pruned, method, amount, scores)
        removed = 1 - torch_dimap.summarize(pruned).model.density
        for how, model in reconstructed(pruned, train, test, options):
            logarithms, correct = answer(model)
            row = {"method": method + how, "amount": amount,
                   "parameters_removed": round(removed, 6),
                   **measures(logarithms, correct)}  # fmt: skip
            if not how:
                one_shot = correct
            else:
                row["gained"] = int((correct & ~one_shot).sum())
                row["lost"] = int((one_shot & ~correct).sum())
            rows.append(row)
    return rows


def spread(rows: list[dict], method: str, amount: float) -> list[float]:
    return [r["top1"] for r in rows if (r["method"], r["amount"]) == (method, amount)]


def markdown(rows: list[dict], options: argparse.Namespace) -> str:
    """Lay out the means, and the lowest and the highest of several seeds."""

    def cell(values: list[float]) -> str:
        text = f"{statistics.mean(values):.2f}"
        return text + (f" ({min(values):.2f}–{max(values):.2f})" if len(values) > 1 else "")

    lines = [
        f"Top-1 in one shot; dense {cell(spread(rows, 'dense', 0.0))}. Columns: the share of the "
        "prunable weights that is removed.",
        "",
        "| method | " + " | ".join(f"{amount:.0%}" for amount in options.amounts) + " |",
        "|---|" + "---:|" * len(options.amounts),
    ]
    for method in dict.fromkeys(row["method"] for row in rows[1:] if row["method"] != "dense"):
        cells = [cell(spread(rows, method, amount)) for amount in options.amounts]
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    about = rows[0]
    lines += [
        "",
        f"`{about['command']}`, on {about['machine']}, torch {about['torch']}, timm "
        f"{about['timm']}, commit {about['commit']}.",
    ]
    return "\n".join(lines) + "\n"


def plot(rows: list[dict], options: argparse.Namespace, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(10, 4.2), sharey=True, layout="constrained")
    colours = {method: f"C{i}" for i, method in enumerate(METHODS)}
    amounts = [0.0, *options.amounts]
    for axes, (title, methods) in zip(panels, PANELS.items()):
        for method in (m for m in methods if m in options.methods):
            values = [spread(rows, "dense", 0.0)]
            values += [spread(rows, method, amount) for amount in options.amounts]
            axes.plot(amounts, [statistics.mean(v) for v in values], "o-", label=method,
                      color=colours[method], markersize=4)  # fmt: skip
            axes.fill_between(amounts, [min(v) for v in values], [max(v) for v in values],
                              color=colours[method], alpha=0.15, linewidth=0)  # fmt: skip
        axes.set_title(title, fontsize="medium")
        axes.set_xlabel("share of the prunable weights removed")
        axes.xaxis.set_major_formatter(lambda x, _: f"{x:.0%}")
        axes.grid(True, alpha=0.3)
        axes.legend(fontsize="small")
    panels[0].set_ylabel("top-1 in one shot, %")
    figure.savefig(path, dpi=150)


def main() -> None:
    options = parse()
    train_data, test_data, classes = open_splits(options)
    files = options.checkpoints or [None]
    about = provenance(options.device)
    rows: list[dict] = []
    refits = len(options.reconstruct) * len(options.damping) * len(options.ways)
    variants = len(options.methods) * len(options.amounts) * (1 + refits)
    steps = len(files) * (1 + variants)
    with tqdm(total=steps, unit="test", desc="one-shot top-1") as bar:
        for i, file in enumerate(files):
            model = load_model(
                options.model, pretrained=options.pretrained, checkpoint=file,
                num_classes=classes, **options.model_kwargs,
            ).to(options.device)  # fmt: skip
            set_transforms(train_data, test_data, model, options)
            own = argparse.Namespace(**{**vars(options), "seed": options.seed + i})
            loaders = training_loader(train_data, own), test_loader(test_data, own)
            source = {"weights": str(file or options.model), "seed": own.seed}
            rows += [{**source, **row, **about} for row in compare(model, *loaders, own, bar)]
    options.output.mkdir(parents=True, exist_ok=True)
    with whole_or_not_at_all(options.output / "one_shot.csv", "w") as table:
        write_csv(rows, table)
    text = markdown(rows, options)
    with whole_or_not_at_all(options.output / "one_shot.md", "w") as table:
        table.write(text)
    plot(rows, options, options.output / "one_shot.png")
    print(text)


if __name__ == "__main__":
    try:
        main()
    except OSError as error:
        fail(str(error).strip().splitlines()[-1])

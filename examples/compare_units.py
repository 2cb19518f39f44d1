"""Compare scores for whole heads and neurons in one shot: top-1 without fine-tuning.

Masks units by each score and each ranking, removes them, and counts the test images that
the smaller model still puts in their class.

    python examples/compare_units.py vit_small_patch16_224 --pretrained --data imagenet

Give one checkpoint for each seed of training; the table then shows means, lowest and
highest. With --reconstruct 512 every model is also measured with its kept weights refitted
on so many training images, without their labels, before the units are removed. Writes
NAME.csv (every measurement) and NAME.md to --output.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import statistics
from collections.abc import Iterator
from pathlib import Path

from images import (
    add_data_arguments,
    count_correct,
    open_splits,
    set_transforms,
    test_loader,
    training_loader,
    unlabelled_batches,
)
from models import add_model_kwargs_argument, fail, load_model, whole_or_not_at_all
from provenance import provenance, write_csv
from torch import Tensor, nn
from torch.nn.utils import prune
from tqdm import tqdm
from training import set_seeds
from unit_scores import SCORES

import torch_dimap

KINDS = {"heads": ("heads",), "neurons": ("neurons",), "both": ("heads", "neurons")}


# How the units of several layers compare: the pruning method, and whether layers rank together.
RANKINGS = {
    "share": (torch_dimap.DimapUnstructured, True),  # of its layer, as in Eq. 10
    "plain": (prune.L1Unstructured, True),
    "each layer": (prune.L1Unstructured, False),  # one rate for all
}
METHODS = [
    ("norm", "share"), ("product", "share"), ("value path", "share"), ("taylor", "share"),
    ("norm", "plain"), ("taylor", "plain"),
    ("norm", "each layer"), ("product", "each layer"), ("random", "each layer"),
]  # fmt: skip
FOREIGN = [("torch-pruning", "plain"), ("torch-pruning", "each layer")]  # need that package


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
    add("--kinds", nargs="+", choices=KINDS, default=["heads", "neurons"],
        help="which units go: heads, then neurons, or both together (default: heads neurons)")
    add("--amounts", type=float, nargs="+", default=[0.25, 0.5, 0.75, 0.9], metavar="A",
        help="fractions of the units (default: 0.25 0.5 0.75 0.9)")
    names = [", ".join(method) for method in METHODS + FOREIGN]
    add("--methods", nargs="+", choices=names, default=names[: len(METHODS)], metavar="NAME",
        help="a score and how it ranks, such as 'product, share' (default: all but those of "
        "Torch-Pruning, 'torch-pruning, plain' and 'torch-pruning, each layer')")
    add("--reconstruct", type=int, nargs="*", default=[], metavar="N",
        help="also refit the kept weights, on each of these numbers of images")
    add("--minimum", type=int, default=0, metavar="N",
        help="units that every layer keeps (default: 0)")
    add("--seed", type=int, default=0,
        help="of the images and of random scores; counted up by file (default: 0)")
    add("--output", type=Path, default=Path("examples/results"), metavar="DIR",
        help="(default: examples/results)")
    add("--name", default="units_one_shot", help="of the files (default: units_one_shot)")
    options = parser.parse_args()
    if min(options.reconstruct, default=1) < 1:
        parser.error("--reconstruct takes numbers of images, at least 1")
    options.methods = [m for m in METHODS + FOREIGN if ", ".join(m) in options.methods]
    return options


def mask_units(
    model: nn.Module, kind: str, amount: float, scores: dict[str, Tensor], ranking: str,
    minimum: int,
) -> int:  # fmt: skip
    """Mask units of one kind or of both; return how many are left."""
    method, together = RANKINGS[ranking]
    units = torch_dimap.group_units(model)
    groups = {kind: units[kind] for kind in KINDS[kind]}
    if not together:
        groups = {layer.name: [layer] for layers in groups.values() for layer in layers}
    done = torch_dimap.global_module_aware_structured(
        groups, amount, scores, minimum, pruning_method=method
    )
    return sum(sum(cut.kept.values()) for cut in done.values())


def refitted(
    masked: nn.Module, calibration: dict[int, list[Tensor]]
) -> Iterator[tuple[str, nn.Module]]:
    """Yield a masked model as it is, then refitted on each number of images."""
    yield "", masked
    for count, images in calibration.items():
        model = copy.deepcopy(masked)
        torch_dimap.reconstruct(model, images)
        yield f", reconstructed on {count} images", model


def compare(
    dense: nn.Module, batch: tuple[Tensor, Tensor], calibration: dict[int, list[Tensor]],
    test: list, options: argparse.Namespace, bar: tqdm,
) -> list[dict]:  # fmt: skip
    """Return a row for the dense model, and one for every kind, amount and method."""
    images = sum(len(labels) for _, labels in test)

    def top1(model: nn.Module) -> float:
        bar.update()
        return 100 * count_correct(model, test, options) / images

    rows: list[dict] = [{"kind": "", "score": "dense", "ranking": "", "amount": 0.0,
                         "units_kept": "", "top1": top1(dense)}]  # fmt: skip
    for kind in options.kinds:
        units = torch_dimap.group_units(dense)
        layers = [layer for part in KINDS[kind] for layer in units[part]]
        set_seeds(options.seed)
        known = {
            name: {layer.name: values for layer, values in
                   SCORES[name](layers, dense, batch, options).items()}
            for name in dict.fromkeys(name for name, _ in options.methods)
        }  # fmt: skip
        for amount, (score, ranking) in itertools.product(options.amounts, options.methods):
            masked = copy.deepcopy(dense)
            set_seeds(options.seed)
            kept = mask_units(masked, kind, amount, known[score], ranking, options.minimum)
            for how, model in refitted(masked, calibration):
                accuracy = top1(torch_dimap.remove_units(copy.deepcopy(model)))
                rows.append({"kind": kind, "score": score + how, "ranking": ranking,
                             "amount": amount, "units_kept": kept, "top1": accuracy})
    return rows


def markdown(rows: list[dict], options: argparse.Namespace) -> str:
    """Lay out the means, and the lowest and the highest of several seeds."""

    def cell(**wanted: object) -> str:
        values = [r["top1"] for r in rows if all(r[key] == x for key, x in wanted.items())]
        text = f"{statistics.mean(values):.2f}"
        return text + (f" ({min(values):.2f}–{max(values):.2f})" if len(values) > 1 else "")

    lines = [f"Top-1 without fine-tuning; dense {cell(score='dense')}. Columns: the share of the "
             f"units of that kind that is removed; every layer keeps at least {options.minimum}."]
    for kind in options.kinds:
        lines += [
            "",
            f"| {kind} | ranked | " + " | ".join(f"{a:.0%}" for a in options.amounts) + " |",
            "|---|---|" + "---:|" * len(options.amounts),
        ]
        rowed = dict.fromkeys((r["score"], r["ranking"]) for r in rows if r["kind"] == kind)
        for score, ranking in rowed:
            cells = [cell(kind=kind, score=score, ranking=ranking, amount=amount)
                     for amount in options.amounts]  # fmt: skip
            lines.append(f"| {score} | {ranking} | " + " | ".join(cells) + " |")
    about = rows[0]
    lines += [
        "",
        f"`{about['command']}`, on {about['machine']}, torch {about['torch']}, timm "
        f"{about['timm']}, commit {about['commit']}.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    options = parse()
    train_data, test_data, classes = open_splits(options)
    files = options.checkpoints or [None]
    about = provenance(options.device)
    rows: list[dict] = []
    variants = len(options.kinds) * len(options.methods) * len(options.amounts)
    steps = len(files) * (1 + variants * (1 + len(options.reconstruct)))
    with tqdm(total=steps, unit="test", desc="one-shot top-1") as bar:
        for i, file in enumerate(files):
            model = load_model(
                options.model, pretrained=options.pretrained, checkpoint=file,
                num_classes=classes, **options.model_kwargs,
            ).to(options.device)  # fmt: skip
            set_transforms(train_data, test_data, model, options)
            own = argparse.Namespace(**{**vars(options), "seed": options.seed + i})
            test = test_loader(test_data, own)
            if i == 0:
                images = list(test) if len(test_data) <= 20_000 else test  # decoded once
            batch = next(iter(training_loader(train_data, own)))
            calibration = {
                count: unlabelled_batches(
                    train_data, count, own.batch_size, test_data.transform, own.seed
                )
                for count in own.reconstruct
            }
            source = {"weights": str(file or options.model), "seed": own.seed}
            found = compare(model, batch, calibration, images, own, bar)
            rows += [{**source, **row, **about} for row in found]
    options.output.mkdir(parents=True, exist_ok=True)
    with whole_or_not_at_all(options.output / f"{options.name}.csv", "w") as table:
        write_csv(rows, table)
    text = markdown(rows, options)
    with whole_or_not_at_all(options.output / f"{options.name}.md", "w") as table:
        table.write(text)
    print(text)


if __name__ == "__main__":
    try:
        main()
    except OSError as error:
        fail(str(error).strip().splitlines()[-1])

"""Compare scores for whole heads and neurons in one shot: top-1 without fine-tuning.

Masks units by each score and each ranking, removes them, and counts the test images that
the smaller model still puts in their class.

    python examples/compare_units.py vit_small_patch16_224 --pretrained --data imagenet

Give one checkpoint for each seed of training; the table then shows means, lowest and
highest. Writes NAME.csv (every measurement) and NAME.md to --output.
"""

from __future__ import annotations

import argparse
import copy
import csv
import itertools
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from images import (
    add_data_arguments,
    autocast,
    count_correct,
    open_splits,
    set_transforms,
    test_loader,
    training_loader,
)
from models import add_model_kwargs_argument, load_model, whole_or_not_at_all
from provenance import provenance
from torch import Tensor, nn
from torch.nn.utils import prune
from tqdm import tqdm
from training import set_seeds

import torch_dimap
from torch_dimap.units import UnitLayer, unit_magnitudes

Scores = dict[UnitLayer, Tensor]


def norm(layer: UnitLayer) -> Tensor:
    """Return the norm of all that a unit holds."""
    norms = []
    for part in (part for part in layer.parts if part.masked):
        view, others = part.by_unit(part.tensor)
        norms.append(torch.linalg.vector_norm(view, dim=others))
    return torch.stack(norms).norm(dim=0)


def value_path(layer: UnitLayer) -> Tensor:
    """Return the norm of the matrix that a unit applies to its input, softmax or GELU aside.

    For a neuron that is the product; for a head, projection times value.
    """
    if layer.kind != "heads":
        return unit_magnitudes(layer)
    part = layer.parts[0]  # of qkv: its last block holds the values
    view, _ = part.by_unit(part.tensor)
    values = view[-1]  # units, entries, inputs
    columns, _ = layer.read.by_unit(layer.read.tensor)  # outputs, 1, units, entries
    return torch.einsum("ohe,hei->hoi", columns[:, 0], values).flatten(1).norm(dim=1)


def weights_alone(score: Callable[[UnitLayer], Tensor]) -> Callable[..., Scores]:
    return lambda layers, model, batch, options: {layer: score(layer) for layer in layers}


def taylor(
    layers: list[UnitLayer],
    model: nn.Module,
    batch: tuple[Tensor, Tensor],
    options: argparse.Namespace,
) -> Scores:
    """Return the mean over images of how much the loss would change without a unit."""
    inputs: dict[UnitLayer, Tensor] = {}

    def keep(layer: UnitLayer) -> Callable:
        def hook(_: nn.Module, arguments: tuple[Tensor]) -> None:
            arguments[0].retain_grad()
            inputs[layer] = arguments[0]

        return hook

    hooks = [layer.reader.register_forward_pre_hook(keep(layer)) for layer in layers]
    images, labels = (x.to(options.device) for x in batch)
    with autocast(options):
        outputs = model.eval()(images)
    F.cross_entropy(outputs.float(), labels).backward()
    for hook in hooks:
        hook.remove()
    scores = {}
    for layer, x in inputs.items():
        change = (x * x.grad).movedim(layer.channels, -1).reshape(len(images), -1, x.shape[-1])
        heads = change.sum(1).unflatten(1, (layer.units, -1))
        scores[layer] = heads.sum(2).abs().mean(0).float()
    model.zero_grad()
    return scores


def chance(layers: list[UnitLayer], *_: object) -> Scores:
    return {layer: torch.rand(layer.units) for layer in layers}


SCORES: dict[str, Callable[..., Scores]] = {
    "norm": weights_alone(norm),
    "product": weights_alone(unit_magnitudes),  # of what makes a unit and what reads it
    "value path": weights_alone(value_path),
    "taylor": taylor,
    "random": chance,
}
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
    add("--kinds", nargs="+", choices=["heads", "neurons"], default=["heads", "neurons"],
        help="which units go, one after the other (default: both)")
    add("--amounts", type=float, nargs="+", default=[0.25, 0.5, 0.75, 0.9], metavar="A",
        help="fractions of the units (default: 0.25 0.5 0.75 0.9)")
    add("--minimum", type=int, default=0, metavar="N",
        help="units that every layer keeps (default: 0)")
    add("--seed", type=int, default=0,
        help="of the labelled batch and of random scores; counted up by file (default: 0)")
    add("--output", type=Path, default=Path("examples/results"), metavar="DIR",
        help="(default: examples/results)")
    add("--name", default="units_one_shot", help="of the files (default: units_one_shot)")
    return parser.parse_args()


def prune_units(
    model: nn.Module, kind: str, amount: float, scores: dict[str, Tensor], ranking: str,
    minimum: int,
) -> int:  # fmt: skip
    """Mask units of one kind and remove them; return how many are left."""
    method, together = RANKINGS[ranking]
    layers = torch_dimap.group_units(model)[kind]
    groups = {kind: layers} if together else {layer.name: [layer] for layer in layers}
    done = torch_dimap.global_module_aware_structured(
        groups, amount, scores, minimum, pruning_method=method
    )
    torch_dimap.remove_units(model)
    return sum(sum(cut.kept.values()) for cut in done.values())


def compare(
    dense: nn.Module, batch: tuple[Tensor, Tensor], test: list, options: argparse.Namespace,
    bar: tqdm,
) -> list[dict]:  # fmt: skip
    """Return a row for the dense model, and one for every kind, amount and method."""
    images = sum(len(labels) for _, labels in test)

    def top1(model: nn.Module) -> float:
        bar.update()
        return 100 * count_correct(model, test, options) / images

    rows: list[dict] = [{"kind": "", "score": "dense", "ranking": "", "amount": 0.0,
                         "units_kept": "", "top1": top1(dense)}]  # fmt: skip
    for kind in options.kinds:
        layers = torch_dimap.group_units(dense)[kind]
        set_seeds(options.seed)
        known = {
            name: {layer.name: values for layer, values in
                   score(layers, dense, batch, options).items()}
            for name, score in SCORES.items()
        }  # fmt: skip
        for amount, (score, ranking) in itertools.product(options.amounts, METHODS):
            model = copy.deepcopy(dense)
            set_seeds(options.seed)
            kept = prune_units(model, kind, amount, known[score], ranking, options.minimum)
            rows.append({"kind": kind, "score": score, "ranking": ranking, "amount": amount,
                         "units_kept": kept, "top1": top1(model)})  # fmt: skip
    return rows


def markdown(rows: list[dict], options: argparse.Namespace) -> str:
    """Lay out the means, and the lowest and the highest of several seeds."""

    def cell(**wanted: object) -> str:
        values = [r["top1"] for r in rows if all(r[key] == x for key, x in wanted.items())]
        text = f"{statistics.mean(values):.2f}"
        return text + (f" ({min(values):.2f}–{max(values):.2f})" if len(values) > 1 else "")

    lines = [f"Top-1 in one shot; dense {cell(score='dense')}. Columns: the share of the units "
             f"of that kind that is removed; every layer keeps at least {options.minimum}."]
    for kind in options.kinds:
        lines += [
            "",
            f"| {kind} | ranked | " + " | ".join(f"{a:.0%}" for a in options.amounts) + " |",
            "|---|---|" + "---:|" * len(options.amounts),
        ]
        for score, ranking in METHODS:
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
    steps = len(files) * (1 + len(options.kinds) * len(METHODS) * len(options.amounts))
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
            source = {"weights": str(file or options.model), "seed": own.seed}
            rows += [{**source, **row, **about} for row in compare(model, batch, images, own, bar)]
    options.output.mkdir(parents=True, exist_ok=True)
    with whole_or_not_at_all(options.output / f"{options.name}.csv", "w") as table:
        writer = csv.DictWriter(table, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    text = markdown(rows, options)
    with whole_or_not_at_all(options.output / f"{options.name}.md", "w") as table:
        table.write(text)
    print(text)


if __name__ == "__main__":
    main()

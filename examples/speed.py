"""Accuracy against measured time: single weights as zeros, whole units removed.

Tests and times the dense model, DIMAP's zeros (--method dimap of finetune.py) and models
without a share of their heads and neurons (--method units), in one shot and fine-tuned:

    python examples/speed.py swin_tiny_patch4_window7_224 --checkpoints dense.safetensors \\
        --fine-tuned units_50 dimap_50 --data imagenet

Give one checkpoint for each seed of training, and folders that finetune.py has written.
Writes speed.csv (a line per model), speed.md and speed.png to --output. What speed.csv holds
already is not tested again; times are always taken anew, in turns, so run it on an idle
machine, or first with --rounds 0, which leaves the times out.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import statistics
import time
from pathlib import Path

import torch
from images import add_data_arguments, count_correct, open_splits, set_transforms, test_loader
from methods import UNITS, prune_to
from models import add_model_kwargs_argument, fail, load_model, whole_or_not_at_all
from provenance import provenance
from torch import nn
from tqdm import tqdm

import torch_dimap

KEYS = ("weights", "seed", "method", "amount", "epochs")
FIELDS = [*KEYS, "top1", "parameters", "nonzero", "multiply_adds", "milliseconds", "lower_quartile",
          "upper_quartile", "batch", "command", "machine", "torch", "timm", "commit"]  # fmt: skip


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help="a timm name")
    add("--checkpoints", type=Path, nargs="+", required=True, metavar="FILE",
        help="dense weights, a file for each seed")  # fmt: skip
    add("--seeds", type=int, nargs="+", metavar="N",
        help="the seeds of these files (default: 0 1 ...)")  # fmt: skip
    add("--fine-tuned", type=Path, nargs="*", default=[], metavar="DIR",
        help="folders of finetune.py, with --method dimap or units")  # fmt: skip
    add_model_kwargs_argument(parser)
    add_data_arguments(parser)
    add("--amounts", type=float, nargs="+", default=[0.25, 0.5], metavar="A",
        help="fractions to remove in one shot (default: 0.25 0.5)")  # fmt: skip
    add("--rounds", type=int, default=51, metavar="N",
        help="forwards of each model; 0 leaves the times out (default: 51)")  # fmt: skip
    add("--time-batch", type=int, default=16, metavar="N", help="images in one (default: 16)")
    add("--output", type=Path, default=Path("examples/results"), metavar="DIR",
        help="(default: examples/results)")  # fmt: skip
    options = parser.parse_args()
    options.seeds = options.seeds or list(range(len(options.checkpoints)))
    if len(options.seeds) != len(options.checkpoints):
        parser.error("--seeds must be as many as --checkpoints")
    if options.rounds < 0 or options.rounds == 1:
        parser.error(f"--rounds must be 0, or 2 and more, found {options.rounds}")
    return options


def jobs(options: argparse.Namespace) -> list[dict]:
    """List the models to measure, each by where its weights are and what is done to them."""
    found = []
    for file, seed in zip(options.checkpoints, options.seeds):
        base = {"weights": str(file), "seed": seed, "epochs": 0}
        found.append({**base, "method": "dense", "amount": 0.0})
        found += [{**base, "method": method, "amount": amount}
                  for method, amount in itertools.product(("dimap", UNITS), options.amounts)]
    for folder in options.fine_tuned:
        try:
            with open(folder / "log.csv", newline="") as file:
                *_, last = csv.DictReader(file)
            row = {"weights": str(folder / "model.safetensors"), "seed": int(last["seed"]),
                   "method": last["method"], "amount": float(last["amount"]),
                   "epochs": int(last["epoch"])}  # fmt: skip
        except (OSError, ValueError, KeyError):
            fail(f"{folder} must hold the log.csv of a run of finetune.py.")
        if row["method"] not in ("dense", "dimap", UNITS):
            fail(f"{folder} must be of --method dimap or units, found {row['method']}.")
        found.append(row)
    return [{key: row[key] for key in KEYS} for row in found]


def build(job: dict, classes: int, options: argparse.Namespace) -> nn.Module:
    """Return the model of a job as it would be deployed: zeros baked, units removed."""
    model = load_model(options.model, checkpoint=Path(job["weights"]), num_classes=classes,
                       **options.model_kwargs)  # fmt: skip
    if job["amount"] and not job["epochs"]:
        prune_to(model, job["method"], job["amount"])
    torch_dimap.remove_all(model)
    if job["method"] == UNITS:
        torch_dimap.remove_units(model)
    return model.eval().to(options.device)


def take_times(models: list[nn.Module], images: torch.Tensor, options: argparse.Namespace):
    """Return the seconds of every forward of each model, round by round in turns."""
    times: list[list[float]] = [[] for _ in models]
    with torch.inference_mode():
        for i in tqdm(range(-3, options.rounds), desc="forwards", unit="round"):
            for model, own in zip(models, times):
                getattr(torch, options.device).synchronize()
                start = time.perf_counter()
                model(images)
                getattr(torch, options.device).synchronize()
                if i >= 0:  # the first ones plan, allocate and fill caches
                    own.append(time.perf_counter() - start)
    return times


def read(path: Path) -> dict[tuple, dict]:
    """Return what was measured before, by the keys of its model."""
    if not path.exists():
        return {}
    with open(path, newline="") as file:
        return {tuple(row[key] for key in KEYS): row for row in csv.DictReader(file)}


def write(path: Path, rows: list[dict]) -> None:
    with whole_or_not_at_all(path, "w") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        writer.writerows(rows)


def spread(values: list[float], digits: int = 2) -> str:
    middle = f"{statistics.mean(values):.{digits}f}"
    if len(values) == 1:
        return middle
    return f"{middle} ({min(values):.{digits}f}–{max(values):.{digits}f})"


def label(method: str, amount: float, epochs: int) -> str:
    name = {"dense": "dense", "dimap": "DIMAP, zeros", UNITS: "units, removed"}[method]
    if amount:
        name += f", {amount:.0%}"
    return f"{name}, fine-tuned" if epochs else name


def by_kind(rows: list[dict]) -> dict[tuple[str, float, int], list[dict]]:
    """Put the seeds of one method, amount and training together."""
    kinds: dict[tuple[str, float, int], list[dict]] = {}
    for row in rows:
        key = (row["method"], float(row["amount"]), int(row["epochs"]))
        kinds.setdefault(key, []).append(row)
    order = ("dense", "dimap", UNITS)
    return dict(sorted(kinds.items(), key=lambda x: (order.index(x[0][0]), x[0][2], x[0][1])))


def markdown(rows: list[dict]) -> str:
    lines = [
        "| model | seeds | top-1 | parameters, M | of them not zero, M | multiply-adds, M "
        "| milliseconds |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for key, same in by_kind(rows).items():
        millions = [
            spread([float(row[field]) / 1e6 for row in same], 3)
            for field in ("parameters", "nonzero", "multiply_adds")
        ]
        timed = [float(row["milliseconds"]) for row in same if row["milliseconds"] != ""]
        cells = [label(*key), str(len(same)), spread([float(row["top1"]) for row in same]),
                 *millions, spread(timed) if timed else ""]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    about = rows[-1]
    timed = f"the median forward of {about['batch']} images" if about["batch"] else "not measured"
    lines += ["", "Means, in brackets the lowest and the highest of the seeds; multiply-adds as "
              f"computed for one image, with zeros among the factors; milliseconds: {timed}."]
    lines += ["", f"`{about['command']}`, on {about['machine']}, torch {about['torch']}, timm "
              f"{about['timm']}, commit {about['commit']}."]  # fmt: skip
    return "\n".join(lines) + "\n"


def plot(rows: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    curves: dict[tuple[str, bool], list[list[dict]]] = {}
    kinds = by_kind(rows)
    for (method, _, epochs), same in kinds.items():
        curves.setdefault((method, epochs > 0), []).append(same)
    for (method, tuned), points in curves.items():
        if method != "dense" and ("dense", False) in curves:
            points = curves["dense", False] + points
        times, accuracies = (
            [[float(row[field]) for row in same] for same in points]
            for field in ("milliseconds", "top1")
        )
        middle = [statistics.mean(values) for values in accuracies]
        errors = [[m - min(v) for m, v in zip(middle, accuracies)],
                  [max(v) - m for m, v in zip(middle, accuracies)]]  # fmt: skip
        axes.errorbar(
            [statistics.mean(values) for values in times], middle, errors, capsize=3,
            fmt="s--" if tuned else "o-", color=f"C{('dense', 'dimap', UNITS).index(method)}",
            label=label(method, 0.0, int(tuned)), markersize=5,
        )  # fmt: skip
    axes.set_xlabel(f"milliseconds for {rows[0]['batch']} images, median forward")
    axes.set_ylabel("top-1, %")
    axes.set_xlim(left=0)
    axes.grid(True, alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=150)


def main() -> None:
    options = parse()
    train, test, classes = open_splits(options)
    listed = jobs(options)
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / "speed.csv"
    before, rows, models = read(path), [], []
    for job in tqdm(listed, desc="tests", unit="model"):
        model = build(job, classes, options)
        models.append(model)
        row = before.get(tuple(map(str, job.values())))
        if row is None:
            set_transforms(train, test, model, options)
            image = torch.zeros(1, *test[0][0].shape, device=options.device)
            row = {**job, **provenance(options.device), "milliseconds": "", "batch": "",
                   "top1": 100 * count_correct(model, test_loader(test, options), options)
                   / len(test),
                   "parameters": sum(p.numel() for p in model.parameters()),
                   "nonzero": sum(int(p.count_nonzero()) for p in model.parameters()),
                   "multiply_adds": torch_dimap.count_flops(model, image).dense}  # fmt: skip
        rows.append(row)
        write(path, rows + [old for key, old in before.items() if key not in keys_of(rows)])
    if options.rounds:
        set_transforms(train, test, models[0], options)
        images = torch.randn(options.time_batch, *test[0][0].shape).to(options.device)
        for row, own in zip(rows, take_times(models, images, options)):
            low, middle, high = (round(1e3 * x, 3) for x in statistics.quantiles(own, n=4))
            row.update(milliseconds=middle, lower_quartile=low, upper_quartile=high,
                       batch=options.time_batch, **provenance(options.device))  # fmt: skip
    write(path, rows)
    text = markdown(rows)
    with whole_or_not_at_all(options.output / "speed.md", "w") as file:
        file.write(text)
    if all(row["milliseconds"] != "" for row in rows):
        plot(rows, options.output / "speed.png")
    print(text)


def keys_of(rows: list[dict]) -> set[tuple[str, ...]]:
    return {tuple(str(row[key]) for key in KEYS) for row in rows}


if __name__ == "__main__":
    try:
        main()
    except OSError as error:
        fail(str(error).strip().splitlines()[-1])

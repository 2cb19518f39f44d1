"""Whether prune_units_to_latency() keeps its word: asked, predicted, measured again.

Models have random weights. The call masks units to a share of the dense model's time; then
the masked ones are removed, and the result is timed against a dense copy once more, by a
clock of this script, in turns. Writes latency_budget.csv and latency_budget.md to --output; a
run replaces the models and batches that it measures.

    python benchmarks/latency_budget.py --models Swin-T ViT-S --batch-sizes 1 4
"""

from __future__ import annotations

import argparse
import copy
import csv
import statistics
import time
from pathlib import Path

import timm
import torch
from latency import MODELS, seconds
from prune import provenance

import torch_dimap

FIELDS = ["model", "batch", "asked", "predicted", "reached", "again", "lower_quartile",
          "upper_quartile", "dense_seconds", "amount", "multiply_adds", "call_seconds",
          "seed", "command", "machine", "torch", "timm", "commit"]  # fmt: skip


def measure(name: str, batch: int, options: argparse.Namespace) -> dict:
    """Return what was asked for and what came out, as shares of the dense model's time."""
    torch.manual_seed(options.seed)
    dense = timm.create_model(MODELS.get(name, name)).eval()
    images = torch.randn(batch, *timm.data.resolve_model_data_config(dense)["input_size"])
    model = copy.deepcopy(dense)
    start = time.perf_counter()
    budget = torch_dimap.prune_units_to_latency(model, images, options.target)
    took = time.perf_counter() - start
    torch_dimap.remove_units(model)
    for _ in range(2):
        model(images), dense(images)  # the first run plans and allocates
    turns = [[seconds(lambda: x(images), "cpu") for x in (model, dense)]
             for _ in range(options.rounds)]  # fmt: skip
    low, again, high = statistics.quantiles((slim / whole for slim, whole in turns), n=4)
    counts = [torch_dimap.count_flops(x, images[:1]).dense for x in (model, dense)]
    return {
        "model": name, "batch": batch, "asked": options.target,
        "predicted": budget.predicted / budget.dense, "reached": budget.reached / budget.dense,
        "again": again, "lower_quartile": low, "upper_quartile": high,
        "dense_seconds": budget.dense, "amount": max(budget.amount.values()),
        "multiply_adds": counts[0] / counts[1], "call_seconds": took, "seed": options.seed,
        **provenance("cpu"),
    }  # fmt: skip


def markdown(rows: list[dict]) -> str:
    lines = [
        "Shares of the dense model's time. Predicted: by the search; reached: measured again by "
        "the call; afterwards: by another clock, in brackets the quartiles.",
        "",
        "| model | batch | asked | predicted | reached | afterwards | units removed "
        "| multiply-adds | dense, ms | the call, s |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        asked, predicted, reached, again, low, high = (
            float(row[key]) for key in ("asked", "predicted", "reached", "again", "lower_quartile",
                                        "upper_quartile"))  # fmt: skip
        lines.append(
            f"| {row['model']} | {row['batch']} | {asked:.2f} | {predicted:.3f} | {reached:.3f} "
            f"| {again:.3f} ({low:.3f}–{high:.3f}) | {float(row['amount']):.1%} "
            f"| {float(row['multiply_adds']):.1%} | {1e3 * float(row['dense_seconds']):.0f} "
            f"| {float(row['call_seconds']):.0f} |"
        )
    about = rows[0]
    lines += ["", f"`python benchmarks/latency_budget.py`, on {about['machine']}, torch "
              f"{about['torch']}, timm {about['timm']}, commit {about['commit']}."]  # fmt: skip
    return "\n".join(lines) + "\n"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--models", nargs="+", default=["Swin-T", "ViT-S"], metavar="MODEL",
        help=f"of {', '.join(MODELS)}, or any timm name (default: Swin-T ViT-S)")  # fmt: skip
    add("--batch-sizes", type=int, nargs="+", default=[1, 4], metavar="N", help="(default: 1 4)")
    add("--target", type=float, default=0.6, help="share of the dense time (default: 0.6)")
    add("--rounds", type=int, default=15, metavar="N", help="of the last clock (default: 15)")
    add("--seed", type=int, default=0, help="of weights and images (default: 0)")
    add("--output", type=Path, default=Path("benchmarks/results"), metavar="DIR",
        help="(default: benchmarks/results)")  # fmt: skip
    return parser.parse_args()


def main() -> None:
    options = parse()
    rows = [{key: str(value) for key, value in measure(name, batch, options).items()}
            for name in options.models for batch in options.batch_sizes]  # fmt: skip
    path = options.output / "latency_budget.csv"
    if path.exists():
        fresh = {(row["model"], row["batch"]) for row in rows}
        with open(path, newline="") as file:
            rows += [x for x in csv.DictReader(file) if (x["model"], x["batch"]) not in fresh]
    rows.sort(key=lambda row: (row["model"], int(row["batch"])))
    options.output.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        writer.writerows(rows)
    (options.output / "latency_budget.md").write_text(markdown(rows))
    print(markdown(rows))


if __name__ == "__main__":
    main()

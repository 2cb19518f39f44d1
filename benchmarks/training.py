"""What masks cost in training: the time of a step with 50 % pruned against the dense model.

torch multiplies every mask in at each forward. A step is forward, backward and AdamW on
random images. Round by round one step each of:

  dense        no masks
  torch        float masks, by prune.l1_unstructured on every layer
  torch_dimap  boolean masks, by global_module_aware_unstructured

Writes training.csv (every step) and training.md (medians, and the medians of the ratios to
the dense step of the same round) to --output; on a GPU training-cuda.csv and so on.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from prune import provenance, write_csv
from torch import nn
from torch.nn.utils import prune
from tqdm import tqdm

import torch_dimap

AMOUNT = 0.5


def dense(model: nn.Module) -> None:
    pass


def torch_masks(model: nn.Module) -> None:
    for pairs in torch_dimap.group_parameters(model).values():
        for module, name in pairs:
            prune.l1_unstructured(module, name, amount=AMOUNT)


def our_masks(model: nn.Module) -> None:
    groups = torch_dimap.group_parameters(model)
    torch_dimap.global_module_aware_unstructured(groups, amount=AMOUNT)


METHODS = {"dense": dense, "torch": torch_masks, "torch_dimap": our_masks}


def make_step(name: str, method: str, batch: int, options: argparse.Namespace) -> Callable:
    """Return a function that trains a model for one step."""
    torch.manual_seed(options.seed)
    model = timm.create_model(name).to(options.device).train()
    METHODS[method](model)
    size = timm.data.resolve_model_data_config(model)["input_size"]
    images = torch.randn(batch, *size, device=options.device)
    labels = torch.randint(0, model.num_classes, (batch,), device=options.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    dtype = getattr(torch, options.amp) if options.amp != "none" else None

    def step() -> float:
        wait(options.device)
        start = time.perf_counter()
        with torch.autocast(options.device, dtype, enabled=dtype is not None):
            loss = F.cross_entropy(model(images).float(), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        wait(options.device)
        return time.perf_counter() - start

    return step


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def markdown(rows: list[dict], options: argparse.Namespace) -> str:
    first = rows[0]
    lines = [
        f"Medians of {options.repeats} rounds on {first['machine']}, torch {first['torch']}, "
        f"autocast {options.amp}, seed {options.seed}, {AMOUNT:.0%} pruned.",
        "",
        "| model | batch | method | seconds per step | ÷ dense |",
        "|---|---:|---|---:|---:|",
    ]
    for model, batch in dict.fromkeys((row["model"], row["batch"]) for row in rows):
        same = [row for row in rows if (row["model"], row["batch"]) == (model, batch)]
        times = {m: [row["seconds"] for row in same if row["method"] == m] for m in METHODS}
        for method, seconds in times.items():
            ratio = statistics.median(a / b for a, b in zip(seconds, times["dense"]))
            lines.append(
                f"| {model} | {batch} | {method} | {statistics.median(seconds):.4f} "
                f"| {ratio:.3f} |"
            )
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--models", nargs="+", default=["swin_tiny_patch4_window7_224"], metavar="MODEL",
        help="timm names (default: swin_tiny_patch4_window7_224)")  # fmt: skip
    add("--batch-sizes", type=int, nargs="+", default=[1, 8, 32], metavar="N",
        help="images in a step (default: 1 8 32)")  # fmt: skip
    add("--amp", choices=["none", "bfloat16"], default="none", help="autocast (default: none)")
    add("--device", choices=["cpu", "cuda"], default="cpu", help="(default: cpu)")
    add("--repeats", type=int, default=9, metavar="N", help="rounds (default: 9)")
    add("--seed", type=int, default=0, help="of weights and images (default: 0)")
    add("--output", type=Path, default=Path("benchmarks/results"), metavar="DIR",
        help="(default: benchmarks/results)")  # fmt: skip
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("training: --device cuda needs a GPU, and torch finds none.")
    return options


def main() -> None:
    options = parse()
    about = {"device": options.device, "amp": options.amp, "seed": options.seed,
             **provenance(options.device)}  # fmt: skip
    rows = []
    for name in options.models:
        for batch in options.batch_sizes:
            steps = {method: make_step(name, method, batch, options) for method in METHODS}
            for step in steps.values():
                step()  # memory is touched for the first time
            for _ in tqdm(range(options.repeats), desc=f"{name}, batch {batch}"):
                for method, step in steps.items():
                    rows.append({"model": name, "batch": batch, "method": method,
                                 "seconds": step(), **about})  # fmt: skip
    options.output.mkdir(parents=True, exist_ok=True)
    stem = "training" if options.device == "cpu" else "training-cuda"
    with open(options.output / f"{stem}.csv", "w", newline="") as file:
        write_csv(rows, file)
    table = markdown(rows, options)
    (options.output / f"{stem}.md").write_text(table + "\n")
    print(table)


if __name__ == "__main__":
    main()

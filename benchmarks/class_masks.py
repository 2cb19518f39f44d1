"""What class masks cost: a step of their training against the frozen model alone.

Random images, float32. Round by round one each of:

  frozen         the model, frozen: forward, and backward to the images
  masks          the same with class masks on it and their penalty: forward and backward
  masks, AdamW   the same, and AdamW's step on the masks

Writes class_masks.csv (every step) and class_masks.md (medians, and the medians of the ratios
to the frozen one of the same round) to --output.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from prune import provenance, write_csv

import torch_dimap
from torch_dimap.learning import ClassMasks


def make_steps(options: argparse.Namespace) -> tuple[dict[str, Callable[[], None]], ClassMasks]:
    """Return what is timed, by name, and the masks."""
    torch.manual_seed(0)
    frozen = timm.create_model(options.model).eval().requires_grad_(False)
    model = timm.create_model(options.model).eval()
    size = timm.data.resolve_model_data_config(model)["input_size"]
    images = torch.randn(options.batch, *size)
    labels = torch.randint(0, model.num_classes, (options.batch,))
    masks = ClassMasks(model, torch_dimap.group_units(model), model.num_classes)
    optimizer = torch.optim.AdamW(masks.parameters(), lr=1e-2, weight_decay=0.0, fused=True)

    def alone() -> None:
        F.cross_entropy(frozen(images.clone().requires_grad_()), labels).backward()

    def masked() -> None:
        optimizer.zero_grad()
        with masks.labels(labels):
            loss = F.cross_entropy(model(images), labels) + 1e-4 * masks.penalty()
            loss.backward()

    def stepped() -> None:
        masked()
        optimizer.step()

    return {"frozen": alone, "masks": masked, "masks, AdamW": stepped}, masks


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", default="swin_tiny_patch4_window7_224", help="a timm name (default: Swin-T)")
    add("--batch", type=int, default=16, help="images in a step (default: 16)")
    add("--repeats", type=int, default=3, help="rounds (default: 3)")
    add("--output", type=Path, default=Path("benchmarks/results"), metavar="DIR",
        help="(default: benchmarks/results)")
    options = parser.parse_args()
    steps, masks = make_steps(options)
    rows = []
    for i in range(-1, options.repeats):  # the first round warms up
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            rows.append({"model": options.model, "batch": options.batch, "what": name, "round": i,
                         "seconds": time.perf_counter() - start})  # fmt: skip
    rows = [row for row in rows if row["round"] >= 0]
    about = provenance("cpu")
    seconds = {name: [r["seconds"] for r in rows if r["what"] == name] for name in steps}
    lines = ["| step | seconds | ÷ frozen |", "|---|---:|---:|"]
    for name, own in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(own, seconds["frozen"]))
        lines.append(f"| {name} | {statistics.median(own):.3f} | {ratio:.3f} |")
    size = sum(mask.nbytes for mask in masks.parameters()) / 1e6
    lines += [
        "",
        f"{options.model}, {masks.num_classes} classes, batch {options.batch}; medians of "
        f"{options.repeats} rounds. The masks take {size:.1f} MB, their gradients as much, and "
        "AdamW's state twice as much.",
        "",
        f"`{about['command']}`, on {about['machine']}, torch {about['torch']}, timm "
        f"{about['timm']}, commit {about['commit']}.",
    ]
    options.output.mkdir(parents=True, exist_ok=True)
    with open(options.output / "class_masks.csv", "w", newline="") as file:
        write_csv([{**row, **about} for row in rows], file)
    text = "\n".join(lines) + "\n"
    (options.output / "class_masks.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()

"""What a search of SPViT costs: a step of it against a step of training the same model.

Random images, float32, AdamW; both kinds of step take turns. Prints medians and their ratio.

    python benchmarks/single_path.py --models vit_small_patch16_224
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import timm
import torch
import torch.nn.functional as F
from prune import provenance
from torch import nn

from torch_dimap.learning import SinglePathSearch


def make_steps(name: str, batch: int) -> dict[str, Callable[[], None]]:
    """Return a step of training and one of a search."""
    torch.manual_seed(0)
    plain, searched = (timm.create_model(name, drop_path_rate=0.0).train() for _ in range(2))
    search = SinglePathSearch(searched, 0.65, steps=100)
    size = timm.data.resolve_model_data_config(plain)["input_size"]
    images, labels = torch.randn(batch, *size), torch.randint(plain.num_classes, (batch,))
    optimizers = {model: torch.optim.AdamW(model.parameters()) for model in (plain, searched)}

    def step(model: nn.Module, penalty: Callable[[], torch.Tensor | float]) -> None:
        optimizers[model].zero_grad()
        (F.cross_entropy(model(images), labels) + penalty()).backward()
        optimizers[model].step()

    def search_step() -> None:
        step(searched, search.penalty)
        search.update()

    return {"training": lambda: step(plain, lambda: 0.0), "search": search_step}


def seconds(work: Callable[[], None]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--models", nargs="+", default=["vit_small_patch16_224", "swin_tiny_patch4_window7_224"])
    add("--batch", type=int, default=8, help="images in a step (default: 8)")
    add("--rounds", type=int, default=7, help="steps of each kind (default: 7)")
    options = parser.parse_args()
    print("| model | training, s | search, s | ratio |")
    print("|---|---:|---:|---:|")
    for name in options.models:
        steps = make_steps(name, options.batch)
        for work in steps.values():
            work()  # the first allocates
        turns = [[seconds(work) for work in steps.values()] for _ in range(options.rounds)]
        train, search = (statistics.median(own) for own in zip(*turns))
        ratio = statistics.median(b / a for a, b in turns)
        print(f"| {name} | {train:.3f} | {search:.3f} | {ratio:.2f} |")
    about = provenance("cpu")
    print(f"\n{about['machine']}, torch {about['torch']}, commit {about['commit']}.")


if __name__ == "__main__":
    main()

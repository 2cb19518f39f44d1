"""How long a forward takes, measured in turns with another model's."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

SECONDS = 0.5  # a comparison goes on for so long,
ROUNDS = (11, 100)  # but for so many rounds at the least and at the most


Arguments = tuple[Any, ...] | dict[str, Any]


def forward_seconds(model: nn.Module, inputs: Arguments, device: torch.device) -> float:
    """Run one forward, and return how long it took until the device was done."""
    wait: Callable[[], None] = getattr(torch, device.type).synchronize
    with torch.inference_mode():
        wait()
        start = time.perf_counter()
        model(**inputs) if isinstance(inputs, dict) else model(*inputs)
        wait()
        return time.perf_counter() - start


def compare_times(
    model: nn.Module, reference: nn.Module, inputs: Arguments, device: torch.device
) -> tuple[float, float]:
    """Measure one model against another, round by round, one forward of each.

    What slows the machine for a while slows both, and their ratio stays.

    Returns:
        The median of the ratios of the rounds, and the reference's median in seconds.
    """
    for _ in range(2):  # the first run plans, allocates and fills caches
        both = sum(forward_seconds(x, inputs, device) for x in (model, reference))
    rounds = min(max(round(SECONDS / both), ROUNDS[0]), ROUNDS[1])
    times = [
        [forward_seconds(x, inputs, device) for x in (model, reference)] for _ in range(rounds)
    ]
    ratio = statistics.median(own / other for own, other in times)
    return ratio, statistics.median(other for _, other in times)

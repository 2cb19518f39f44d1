"""The smallest amount that meets a target: what a target is, and the search for it."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Mapping
from typing import Any

from torch_dimap.masking import check_amount


def absolute(target: Any, whole: int, unit: str, caller: str) -> int:
    """Return a target as a number of units, whichever way it was given."""
    if isinstance(target, bool) or not isinstance(target, numbers.Real):
        raise TypeError(
            f"{caller}: target must be an int (a number of {unit}) or a float (a "
            f"fraction of the dense model's), found {type(target).__name__}."
        )
    if isinstance(target, numbers.Integral):
        return int(target)
    if not 0.0 <= float(target) <= 1.0:  # NaN fails it too
        raise ValueError(
            f"{caller}: target as a float must lie in [0, 1], found {target}: "
            f"a number of {unit} is given as an int."
        )
    return math.floor(float(target) * whole)


def check_fixed(fixed: Any, unpruned: Mapping[str, int], caller: str) -> dict[str, float]:
    """Return the given amounts of some groups, once they are groups and amounts."""
    if not isinstance(fixed, Mapping):
        raise TypeError(
            f"{caller}: fixed must be a mapping group -> amount, found {type(fixed).__name__}."
        )
    unknown = [group for group in fixed if group not in unpruned]
    if unknown or len(fixed) == len(unpruned):
        raise ValueError(
            f"{caller}: fixed must name some of the groups {list(unpruned)} and leave at least "
            f"one free, found {list(fixed)}."
        )
    for group, amount in fixed.items():
        check_amount(amount, f"{caller}: fixed[{group!r}]")
    return dict(fixed)


def smallest(function: Callable[[int], int], bound: int, high: int) -> tuple[int, int]:
    """Return the smallest step whose value is at most ``bound``, and that value.

    ``function`` never rises, is low enough at ``high``, and costly. It is smooth but for
    its last digits, so regula falsi (the Illinois variant) needs a dozen values of it;
    where it is not, halving takes over.
    """
    low, value, reached = 0, function(0), function(high)
    if value <= bound:
        return 0, value
    root = bound + 0.5  # between two values: neither end may sit on the root
    above, below = value - root, root - reached
    moved, stalled = "", 0
    while high - low > 1:
        width = high - low
        share = above / (above + below) if stalled < 3 else 0.5
        middle = min(max(low + round(width * share), low + 1), high - 1)
        value = function(middle)
        # An end that stays twice running pulls the next guess towards itself.
        if value > bound:
            below /= 2 if moved == "low" else 1
            low, above, moved = middle, value - root, "low"
        else:
            above /= 2 if moved == "high" else 1
            high, below, moved, reached = middle, root - value, "high", value
        stalled = stalled + 1 if 2 * (high - low) > width + 1 else 0
    return high, reached

"""Which units go, for a count: layers rank together, and each keeps a fitting number."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class LayerScores(NamedTuple):
    """What is known of one layer's units."""

    scores: Tensor  # one per unit; higher means keep, between layers too
    unmasked: Tensor  # one flag per unit: which of them may still go
    multiple: int  # of which as many stay as is a multiple of it


def choose_units(
    layers: Sequence[LayerScores], count: int, minimum: int
) -> tuple[list[Tensor], float]:
    """Choose ``count`` units with the lowest scores, so that layers keep fitting numbers.

    A layer's units go from the lowest score up, in steps that bring it from one multiple
    down to the next. The steps of all layers are ranked by the score of their middle unit,
    which rounds each layer to the nearest multiple, and the lowest go until the count is
    reached as nearly as whole steps allow: exactly where ``multiple`` is 1, and else with
    at most half a multiple between. A layer with fewer units than its multiple goes in
    steps of one. Where scores tie, the later layer goes first, and in it the later unit.

    Args:
        layers: what is known of each.
        count: how many units are to go.
        minimum: how many stay in each layer at the least.

    Returns:
        One flag per unit and layer, True for what stays; and the highest score that went,
        0.0 if nothing did.

    Raises:
        ValueError: if fewer than ``count`` can go, with how many it is.
    """
    orders = [_removal_order(layer) for layer in layers]
    steps = [
        (float(layer.scores[order[(start + end - 1) // 2]]), -i, start, end)
        for i, (layer, order) in enumerate(zip(layers, orders))
        for start, end in _steps(len(order), minimum, layer.multiple)
    ]
    steps.sort()
    gone, chosen = 0, 0  # units and steps
    for chosen, (*_, start, end) in enumerate(steps, start=1):
        if gone + (end - start) > count and gone + (end - start) - count >= count - gone:
            chosen -= 1
            break
        gone += end - start
    whole = [_step(len(order), layer.multiple) for order, layer in zip(orders, layers)]
    if count - gone > max(whole) // 2:
        raise ValueError(
            f"{count} units are to go, but only {gone} can where every layer keeps "
            f"{minimum} or more in whole multiples"
        )
    keeps = [layer.unmasked.clone() for layer in layers]
    threshold = 0.0
    for _, i, start, end in steps[:chosen]:
        units = orders[-i][start:end]
        keeps[-i][units] = False
        threshold = max(threshold, float(layers[-i].scores[units[-1]]))
    return keeps, threshold


def most_units(layers: Sequence[LayerScores], minimum: int) -> int:
    """Return how many units can go where each layer keeps ``minimum`` in whole multiples."""
    return sum(
        end - start
        for layer in layers
        for start, end in _steps(int(layer.unmasked.count_nonzero()), minimum, layer.multiple)
    )


def _removal_order(layer: LayerScores) -> Tensor:
    """Return the unmasked units in the order in which they would go."""
    candidates = layer.unmasked.nonzero().squeeze(1).flip(0)
    return candidates[torch.argsort(layer.scores[candidates], stable=True)]


def _step(units: int, multiple: int) -> int:
    return multiple if units >= multiple else 1


def _steps(units: int, minimum: int, multiple: int) -> list[tuple[int, int]]:
    """Cut the removal order of a layer into the steps that it may go."""
    step = _step(units, multiple)
    least = -(-min(minimum, units) // step) * step
    kept = [units, *range((units - 1) // step * step, least - 1, -step)]
    return [(units - more, units - fewer) for more, fewer in zip(kept, kept[1:])]

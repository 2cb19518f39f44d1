"""Which of equal entries stay, where each of several processes holds a part of the weight."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

from torch_dimap.selection.cuts import Cut
from torch_dimap.selection.exchange import Exchange
from torch_dimap.selection.reading import Blocks, Scratch, equal

PIVOTS = 15  # places at which the equal entries before them are counted


class Positions(Protocol):
    """Where the entries of a part lie in the whole weight, flat and in row-major order."""

    @property
    def size(self) -> int:
        """Return how many entries the whole has."""

    def of(self, entries: np.ndarray) -> np.ndarray:
        """Return the places in the whole of places in the part; both ascend."""


class Held(NamedTuple):
    """The part of a weight that a process holds."""

    blocks: Blocks
    positions: Positions
    counts: bool  # in a sum over all processes: False where another one holds the same part


def share_ties(cuts: Sequence[Cut], held: Sequence[Held], exchange: Exchange) -> list[Cut]:
    """Make cuts of whole weights those of the parts here.

    A cut lets the first ones of equal entries stay, in row-major order. The place where these
    end is searched for in all weights at once, by counts of what lies before a few places.
    """
    split = [i for i, cut in enumerate(cuts) if cut.ties]
    equal = {i: _equal(held[i], cuts[i].magnitude) for i in split}
    # Before the low place too few of them lie, before the high one enough.
    lows, highs = dict.fromkeys(split, 0), {i: held[i].positions.size for i in split}
    while open_ := [i for i in split if highs[i] - lows[i] > 1]:
        pivots = [_pivots(lows[i], highs[i]) for i in open_]
        here = [np.searchsorted(equal[i], x) * held[i].counts for i, x in zip(open_, pivots)]
        before = exchange.add(np.concatenate(here).astype(float))
        for i, x, known in zip(open_, pivots, np.split(before, np.cumsum([len(x) for x in here]))):
            enough = int(np.searchsorted(known, cuts[i].ties))
            if enough < len(x):
                highs[i] = int(x[enough])
            if enough:
                lows[i] = int(x[enough - 1])
    own = {i: int(np.searchsorted(equal[i], highs[i])) for i in split}
    return [cut._replace(ties=own.get(i, 0)) for i, cut in enumerate(cuts)]


def _equal(held: Held, magnitude: float) -> np.ndarray:
    """Return where in the whole weight the entries here lie that have a magnitude."""
    found, start, scratch = [np.empty(0, np.int64)], 0, Scratch()
    for block in held.blocks():
        found.append(equal(*block, magnitude, scratch).cpu().numpy() + start)
        start += block[0].numel()
    return held.positions.of(np.concatenate(found))


def _pivots(low: int, high: int) -> np.ndarray:
    """Return places between two others, evenly spread."""
    steps = min(PIVOTS + 1, high - low)
    return low + (high - low) * np.arange(1, steps) // steps

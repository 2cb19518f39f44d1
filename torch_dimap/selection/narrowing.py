"""Cuts of weights too large for memory, found by reading them more often."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import repeat

import numpy as np

from torch_dimap.selection.brackets import Limits, Sample, expected_scores
from torch_dimap.selection.cuts import Cut
from torch_dimap.selection.reading import FlatWeight, search_between, total
from torch_dimap.selection.search import Search, aim_all, all_or_none, begin, finish
from torch_dimap.selection.threads import Map

SAMPLE = 1 << 11  # entries of a weight


def find_cuts_sparingly(
    weights: Sequence[FlatWeight], count: int, map_: Map = map, candidates: int = 1 << 16
) -> tuple[list[Cut], float]:
    """Find what :func:`find_cuts` finds, with few ``candidates`` in memory at a time.

    As long as more of them are to be expected inside the brackets of the group, every
    weight is sampled again inside its own, from which a smaller one follows.
    """
    if (sure := all_or_none(weights, count)) is not None:
        return sure
    searches = list(map_(begin, weights, repeat(SAMPLE)))
    aim_all(searches, count)
    wide = [search for search in searches if search.found is None]
    while (more := _expected(wide)) > candidates:
        for search, sample in zip(wide, map_(_narrow, wide)):
            search.coarse = search.coarse or search.sample
            search.sample = sample
        aim_all(searches, count)
        if _expected(wide) > more / 2:  # equal magnitudes, which nothing can narrow
            break
    return finish(searches, count, map_)


def _expected(searches: Sequence[Search]) -> float:
    """Return how many entries are expected inside the brackets."""
    return sum(_entries_between(search.sample, search.limits) for search in searches)


def _entries_between(sample: Sample, limits: Limits) -> float:
    low, high = np.searchsorted(sample.magnitude, limits, side="right")
    return float(high - low) * sample.entries


def _narrow(search: Search) -> Sample:
    """Sample a weight again, now only inside its bracket; around that nothing is guessed."""
    weight = search.weight
    thin = max(1, int(_entries_between(search.sample, search.limits)) // SAMPLE)
    values, above, energies, seen = [], [], [], 0
    for found in search_between(weight, search.limits):
        above.append(found.above)
        energies.append(found.energy)
        values += found.inside[-seen % thin :: thin].tolist()
        seen += found.inside.numel()
    ascending = np.sort(np.array(values, dtype=float))
    entries = seen / max(1, len(ascending))
    square = np.square(ascending * weight.scale)
    energy = total(energies) + entries * np.cumsum(square[::-1])[::-1]
    below = weight.chooseable - int(total(above)) - seen
    score = expected_scores(weight, ascending, energy)
    return Sample(ascending, score, entries, below, search.limits)

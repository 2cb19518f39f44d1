"""Which entries of a group of weights go, for an exact count, without scoring them all.

Inside a weight the score of :func:`torch_dimap.dimap_scores` falls with the
magnitude, so all there is to find is one magnitude cut per weight. Each weight is read
a few times, in blocks that stay in cache:

1. its energy (sum of squares), which also tells whether all entries are finite;
2. a sample of it, from which all weights together estimate the group's threshold, and
   each weight a bracket around its own cut;
3. the energy above the bracket, and the few entries inside it, the *candidates*;
4. the mask, written once.

The candidates of all weights are compared and the lowest of them chosen. A sample can
mislead: every weight must end with its cut strictly inside its bracket, or the bracket
is widened and the step repeated. Scores that float64 cannot tell apart are compared in
exact rational arithmetic, and so is the threshold. The result is therefore that of exact
arithmetic, whatever the block size, the number of threads or the device.

Order of removal: lower scores first; among equal scores the later weight first; among
equal magnitudes of one weight the later entry, in row-major order, first.

Scratch: a block, the samples and the candidates (on usual weights about 3 % of the
entries, 20 bytes each). Where many magnitudes are equal each is held once, with how often
it occurs: the k-th of equal entries scores ``1 / (A + k)``, where A is the energy above
them over their square.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import compress, repeat

from torch import Tensor

from torch_dimap.selection import brackets
from torch_dimap.selection.brackets import (
    EVERYTHING,
    MARGIN,
    Limits,
    Sample,
    bracket,
    guess_threshold,
    take_sample,
)
from torch_dimap.selection.choosing import choose, highest, threshold_of
from torch_dimap.selection.cuts import Cut, mask_of
from torch_dimap.selection.exact import exact_energy
from torch_dimap.selection.reading import CPU_BLOCK, FlatWeight, blocks_of, read_weight
from torch_dimap.selection.runs import Runs, cut_runs, find_runs
from torch_dimap.selection.threads import Map, threaded_map


def select(
    weights: Sequence[Tensor],
    count: int,
    masks: Sequence[Tensor | None] | None = None,
    names: Sequence[str] | None = None,
) -> tuple[list[Tensor], float]:
    """Choose the ``count`` entries with the lowest DIMAP scores among several weights.

    Args:
        weights: the weights of one group, floating-point tensors of any shapes;
            their dtypes and devices may differ. They are only read.
        count: how many entries to prune.
        masks: for each weight None, or a tensor of its shape that is non-zero where
            the entry may be chosen. All other entries count as zero.
        names: what to call each weight in an error.

    Returns:
        A boolean mask for each weight, contiguous and on its device, True for what
        stays; and the threshold, the highest score that goes (0.0 if nothing does).

    Raises:
        ValueError: if a weight holds NaN or infinity, or ``count`` is negative or above
            the number of entries to choose from.
    """
    on_cpu = all(weight.device.type == "cpu" for weight in weights)
    long = sum(weight.numel() > CPU_BLOCK for weight in weights)  # others are faster without
    with threaded_map(long, on_cpu) as map_:
        blocks = list(map(blocks_of, weights, masks or [None] * len(weights)))
        labels = names or [f"select(): weights[{i}]" for i in range(len(weights))]
        flat = list(map_(read_weight, blocks, labels))
        entries = sum(weight.chooseable for weight in flat)
        if not 0 <= count <= entries:
            raise ValueError(
                f"select(): count must lie between 0 and the {entries} entries "
                f"to choose from, found {count}."
            )
        cuts, threshold = find_cuts(flat, count, map_)
        return list(map_(mask_of, weights, blocks, cuts)), threshold


def find_cuts(
    weights: Sequence[FlatWeight], count: int, map_: Map = map
) -> tuple[list[Cut], float]:
    """Find the cut of each weight of a group, for ``count`` entries in all, and the threshold.

    The weights are read several times, block by block, and need not lie in memory.
    """
    if (sure := all_or_none(weights, count)) is not None:
        return sure
    searches = list(map_(begin, weights, repeat(brackets.SAMPLE)))
    return finish(searches, count, map_)


def all_or_none(
    weights: Sequence[FlatWeight], count: int
) -> tuple[list[Cut], float] | None:
    """Return the cuts where nothing needs to be searched."""
    if count == 0:
        return [Cut(-1.0, 0, weight.chooseable) for weight in weights], 0.0
    if count == sum(weight.chooseable for weight in weights):
        return [Cut(math.inf, 0, 0)] * len(weights), float(any(x.energy for x in weights))
    return None


@dataclass
class Search:
    """How far the search for the cut of one weight has come."""

    weight: FlatWeight
    sample: Sample
    limits: Limits = EVERYTHING  # where the cut is expected
    widened: int = 0  # how often, since it was sampled
    found: Runs | None = None  # what lies inside the limits, once it is read
    coarse: Sample | None = None  # of the whole weight, where the sample is of a part only

    def aim(self, threshold: float) -> None:
        """Bracket the cut that a threshold is expected to make."""
        self.limits = bracket(self.sample, threshold, MARGIN * 4**self.widened)

    def widen(self, threshold: float) -> None:
        """Bracket it again, farther off."""
        self.widened += 1
        before = self.limits
        self.aim(threshold)
        if self.limits == before and self.coarse is not None:  # as wide as it can become
            self.sample, self.coarse, self.widened = self.coarse, None, 0
            self.aim(threshold)
        self.found = None


def begin(weight: FlatWeight, entries: int) -> Search:
    """Sample a weight; one with hardly more entries than the sample is read in full."""
    if weight.size > entries:
        return Search(weight, take_sample(weight, entries))
    found = find_runs(weight, EVERYTHING)
    return Search(weight, Sample(found.magnitude, found.score, 1.0), found=found)


def finish(searches: list[Search], count: int, map_: Map) -> tuple[list[Cut], float]:
    """Read what lies inside the limits, and widen these until the cuts are sure."""
    threshold = aim_all(searches, count)
    while True:
        unread = [search for search in searches if search.found is None]
        weights, limits = [x.weight for x in unread], [x.limits for x in unread]
        for search, runs in zip(unread, map_(find_runs, weights, limits)):
            search.found = runs
        found = [search.found for search in searches if search.found is not None]
        inside = count - sum(runs.below for runs in found)
        if 0 < inside <= sum(runs.entries for runs in found):
            choice = choose(found, inside)
            chosen = choice.settle(_energies(searches, choice.unsettled(), map_))
            # The cut must lie between two candidates, or what was not looked at
            # below or above the bracket might belong on the other side of it.
            missed = [
                (n == 0 and runs.below > 0) or (n == runs.entries and runs.above > 0)
                for n, runs in zip(chosen, found)
            ]
            if not any(missed):
                cuts = [cut_runs(x.weight, r, n) for x, r, n in zip(searches, found, chosen)]
                energies = _energies(searches, highest(found, chosen), map_)
                return cuts, threshold_of(found, chosen, energies)
        else:
            missed = [runs.below + runs.above > 0 for runs in found]
        for search in compress(searches, missed):
            search.widen(threshold)


def _energies(
    searches: list[Search], above: Mapping[int, float], map_: Map
) -> dict[int, Fraction]:
    """Return the exact energies of weights above magnitudes."""
    blocks = [searches[i].weight.blocks for i in above]
    return dict(zip(above, map_(exact_energy, blocks, above.values())))


def aim_all(searches: Sequence[Search], count: int) -> float:
    """Bracket all cuts that are still to be found; return the threshold that is expected."""
    unread = [search for search in searches if search.found is None]
    if not unread:
        return 0.0
    threshold = guess_threshold([search.sample for search in searches], count)
    for search in unread:
        search.aim(threshold)
    return threshold

"""Which entries go where each of several processes holds a part of every weight.

The search is that of :mod:`torch_dimap.selection.search`, but what one process reads of its
part, the others must learn of; weights never travel. All groups and weights go through each
step together, so that the number of exchanges does not depend on how many there are:

1. counts and energies of the parts are joined to those of the weights;
2. a small sample of each weight brackets its cut, and each process picks what it holds inside;
3. the brackets are narrowed, see :mod:`torch_dimap.selection.proving`;
4. the few candidates left are handed round, and every process chooses the same among them.

Sums depend on the order of their terms, which is another one here. As there, the error of a
sum is bounded, and what lies inside of that bound is settled by exact sums of all parts. So
cuts and threshold are those of the whole weights in one process.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction

import numpy as np
import torch

from torch_dimap.selection.brackets import (
    MARGIN,
    SAMPLE,
    Limits,
    Sample,
    bracket,
    guess_threshold,
    sample_of,
    sampled,
)
from torch_dimap.selection.choosing import choose, highest, threshold_of
from torch_dimap.selection.cuts import Cut
from torch_dimap.selection.exact import exact_energy
from torch_dimap.selection.exchange import Exchange, Part, add_exactly
from torch_dimap.selection.proving import LONGEST, Bracket, narrow, pick_inside
from torch_dimap.selection.reading import Blocks, FlatWeight, Reading, read_part, weight_of
from torch_dimap.selection.runs import (
    Inside,
    Runs,
    as_runs,
    cut_runs,
    distinct_of,
    merge,
)
from torch_dimap.selection.search import all_or_none
from torch_dimap.selection.threads import Map

LEAST = 1 << 10  # entries of a weight to sample, over all processes
TOLD = 1 << 8  # bytes of a part for each entry beyond that

Result = tuple[list[Cut], float]


def read_together(
    blocks: Sequence[Blocks],
    dtypes: Sequence[torch.dtype],
    labels: Sequence[str],
    exchange: Exchange,
    map_: Map = map,
) -> list[FlatWeight]:
    """Read weights of which each process holds a part; all raise unless all is finite.

    Args:
        blocks: of the parts here; none where another process holds the same part.
        dtypes: theirs.
        labels: what to call each weight in an error.
    """
    here = list(map_(read_part, blocks))
    own = np.array([x.scale for x in here])
    scale = exchange.least(own) if torch.float64 in dtypes else np.ones(len(own))
    with np.errstate(invalid="ignore"):
        energy = np.where(np.isinf(own), 0.0, scale / own) ** 2 * [x.energy for x in here]
    told = exchange.add(np.append([(x.size, x.chooseable) for x in here], energy))
    counts, energies = told[: 2 * len(here)].reshape(-1, 2), told[2 * len(here) :].tolist()
    return [
        weight_of(x, [Reading(int(size), int(chooseable), *found)], label)
        for x, (size, chooseable), *found, label in zip(blocks, counts, scale, energies, labels)
    ]


def find_cuts_together(
    groups: Sequence[Sequence[FlatWeight]],
    dtypes: Sequence[Sequence[torch.dtype]],
    counts: Sequence[int],
    exchange: Exchange,
    map_: Map = map,
) -> list[Result]:
    """Find for each group what :func:`torch_dimap.selection.search.find_cuts` finds.

    Args:
        groups: the weights of each, from :func:`read_together`.
        dtypes: theirs.
        counts: how many entries of each group go.
    """
    results = {i: all_or_none(*group) for i, group in enumerate(zip(groups, counts))}
    todo = [i for i, result in results.items() if result is None]
    if not todo:
        return [result for result in results.values() if result is not None]
    weights = [weight for i in todo for weight in groups[i]]
    wanted = [
        _sample_size(weight, dtype, exchange.processes)
        for i in todo
        for weight, dtype in zip(groups[i], dtypes[i])
    ]
    samples = dict(zip(map(id, weights), _samples(weights, wanted, exchange, map_)))
    guesses = {
        i: guess_threshold([samples[id(weight)] for weight in groups[i]], counts[i]) for i in todo
    }
    brackets = {
        i: [Bracket(weight, dtype) for weight, dtype in zip(groups[i], dtypes[i])] for i in todo
    }
    widened = dict.fromkeys(samples, 0)
    missed = {i: brackets[i] for i in todo}
    while missed:
        limits = []
        for i, too_narrow in missed.items():
            for x in brackets[i]:
                x.restore()
            for key in (id(x.weight) for x in too_narrow):
                limits.append(bracket(samples[key], guesses[i], MARGIN * 4 ** widened[key]))
                widened[key] += 1
        unread = [x for too_narrow in missed.values() for x in too_narrow]
        _read_inside(unread, limits, exchange, map_)
        beside = {i: _beside(brackets[i], counts[i]) for i in missed}
        sound = {i: brackets[i] for i in missed if not beside[i]}
        chosen, edges = _choose(sound, counts, exchange, map_)
        results |= chosen
        missed = {i: beside[i] or edges[i] for i in missed if i not in chosen}
    return [result for result in results.values() if result is not None]


def _sample_size(weight: FlatWeight, dtype: torch.dtype, processes: int) -> int:
    """Return how many entries of a weight to sample: with more, fewer are left to look at.

    A process sends all others what it has sampled, in a byte or two for each entry.
    """
    if processes == 1:
        return SAMPLE
    part = weight.size * dtype.itemsize // processes
    return min(max(LEAST, part // TOLD), SAMPLE)


def _samples(
    weights: list[FlatWeight], wanted: list[int], exchange: Exchange, map_: Map
) -> list[Sample]:
    here = map_(sampled, weights, wanted)
    told = exchange.gather([Part((), _shortened(x)) for x in here])
    return [
        sample_of(weight, np.sort(np.concatenate([part.values for part in parts])))
        for weight, parts in zip(weights, told)
    ]


def _shortened(magnitude: np.ndarray) -> np.ndarray:
    """Round float32 down to eight binary digits: half of the bytes, and a guess needs no more."""
    if magnitude.dtype != np.float32:
        return magnitude
    return (magnitude.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)


def _read_inside(
    brackets: list[Bracket], limits: list[Limits], exchange: Exchange, map_: Map
) -> None:
    """Pick what lies inside of limits, and count what all processes hold there and above."""
    found = list(map_(pick_inside, [x.weight for x in brackets], limits))
    told = exchange.add(np.array([(x.above, x.entries, x.energy) for x, _ in found]).ravel())
    for x, *start in zip(brackets, limits, found, told.reshape(-1, 3)):
        x.expect(*start)


def _beside(brackets: list[Bracket], count: int) -> list[Bracket]:
    """Return those to widen where the count of a group is reached beside all of them."""
    below = sum(x.left.below for x in brackets)
    inside = sum(x.left.inside for x in brackets)
    if 0 < count - below <= inside:
        return []
    return [x for x in brackets if x.left.inside < x.weight.chooseable]


def _choose(
    groups: Mapping[int, list[Bracket]], counts: Sequence[int], exchange: Exchange, map_: Map
) -> tuple[dict[int, Result], dict[int, list[Bracket]]]:
    """Choose among what lies inside the brackets of groups.

    Returns:
        The results of those groups whose brackets were wide enough, and which were not.
    """
    narrow(groups, counts, exchange)
    found = _hand_round(groups, exchange)
    choices = {
        i: choose(found[i], counts[i] - sum(x.left.below for x in of_group))
        for i, of_group in groups.items()
    }
    asked = {i: choice.unsettled() for i, choice in choices.items()}
    known = _energies(groups, asked, exchange, map_)
    going = {i: choice.settle(known[i]) for i, choice in choices.items()}
    edges = {
        i: [x for x, n in zip(of_group, going[i]) if x.ends_at_the_edge(n)]
        for i, of_group in groups.items()
    }
    sound = [i for i in groups if not edges[i]]
    known = _energies(groups, {i: highest(found[i], going[i]) for i in sound}, exchange, map_)
    results = {
        i: (
            [_cut(x, runs, n) for x, runs, n in zip(groups[i], found[i], going[i])],
            threshold_of(found[i], going[i], known[i]),
        )
        for i in sound
    }
    return results, edges


def _hand_round(
    groups: Mapping[int, list[Bracket]], exchange: Exchange
) -> dict[int, list[Runs]]:
    """Let every process know all candidates."""
    brackets = [x for of_group in groups.values() for x in of_group]
    told = exchange.gather([_shortest(x.left.here) for x in brackets])
    runs = iter([_join(x, parts, exchange.processes) for x, parts in zip(brackets, told)])
    return {i: [next(runs) for _ in of_group] for i, of_group in groups.items()}


def _shortest(here: Inside) -> Part:
    """Tell of equal candidates once, where that is shorter."""
    values, counts = here.values, here.counts
    if counts is None:
        distinct, often = distinct_of(values)
        if 2 * len(distinct) < len(values):
            values, counts = distinct, often
    return Part((), values, counts)


def _join(bracket: Bracket, parts: list[Part], processes: int) -> Runs:
    if all(part.counts is None for part in parts):
        values, counts = np.sort(np.concatenate([part.values for part in parts])), None
    else:
        values, counts = merge([
            distinct_of(part.values) if part.counts is None else (part.values, part.counts)
            for part in parts
        ])  # fmt: skip
    weight, left = bracket.weight, bracket.left
    above = weight.chooseable - left.below - left.inside
    found = Inside(values, counts, above, left.energy, LONGEST)
    return as_runs(weight, found, additions=processes)


def _energies(
    groups: Mapping[int, list[Bracket]],
    above: Mapping[int, Mapping[int, float]],
    exchange: Exchange,
    map_: Map,
) -> dict[int, dict[int, Fraction]]:
    """Return exact energies of whole weights above magnitudes, by group and place in it."""
    asked = [(i, place, x) for i, of_group in above.items() for place, x in of_group.items()]
    blocks = [groups[i][place].weight.blocks for i, place, _ in asked]
    here = list(map_(exact_energy, blocks, [x for *_, x in asked]))
    energies: dict[int, dict[int, Fraction]] = {i: {} for i in above}
    for (i, place, _), energy in zip(asked, add_exactly(here, exchange)):
        energies[i][place] = energy
    return energies


def _cut(bracket: Bracket, runs: Runs, going: int) -> Cut:
    """Cut a weight; of one that has been narrowed all candidates may stay, and others go."""
    if going == 0 and runs.below:
        return Cut(bracket.left.low, 0, bracket.weight.chooseable - runs.below)
    return cut_runs(bracket.weight, runs, going)

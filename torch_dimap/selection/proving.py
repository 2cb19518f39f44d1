"""Brackets narrowed to what counts and energies do not decide, without looking at entries.

With ``E`` for the energy above a magnitude ``p``, all entries up to ``p`` score at most
``p^2 / (E + p^2)``, and all above it more than ``p^2 / E``. Known at a few magnitudes of each
weight of a group, this bounds how many entries score no more than a given threshold, and so
the threshold that the group's count makes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from torch_dimap.selection.brackets import EVERYTHING, Limits, logarithm_of
from torch_dimap.selection.exchange import Exchange
from torch_dimap.selection.reading import CPU_BLOCK, DEVICE_BLOCK, INTEGERS, FlatWeight
from torch_dimap.selection.runs import ROW, Inside, energy_of_first, read_inside

NOTHING = Inside(np.empty(0), None, 0, 0.0, 0)
PIVOTS = 15  # magnitudes at which a bracket is looked at
FEW = 1 << 9  # entries of a weight that may stay undecided
ROUNDS = 16  # enough for any bracket: each one divides 2^63 magnitudes by 16
# Of the logarithm of a score, twice: see choosing.slack_of. Narrowing need not be the closest.
LONGEST = max(CPU_BLOCK, DEVICE_BLOCK)  # block that any process may have read
SLACK = 2.0**-37 + 3 * 2 * (LONGEST + 2 * ROW + (1 << 13)) * 2.0**-52


class Stretch(NamedTuple):
    """What all processes hold up to a magnitude, between it and another one, and above that."""

    low: float
    high: float
    here: Inside  # what this process holds between them
    upwards: np.ndarray  # as in Picked
    below: int  # entries up to the low one
    inside: int  # entries between
    energy: float  # above the high one


class Picked(NamedTuple):
    """What a process holds between two magnitudes."""

    here: Inside
    upwards: np.ndarray  # energy from each of these values on, all above included; and above


def pick_inside(weight: FlatWeight, limits: Limits) -> Picked:
    """Read what is here of a weight between two magnitudes."""
    here = read_inside(weight, limits)
    square = np.square(here.values * weight.scale, dtype=float)
    terms = square if here.counts is None else square * here.counts
    return Picked(here, np.append(energy_of_first(terms, None), 0.0) + here.energy)


class _Look(NamedTuple):
    """What all processes hold of a weight up to each of a few magnitudes, and above them."""

    pivots: np.ndarray = np.empty(0)
    up_to: np.ndarray = np.empty(0)
    energy: np.ndarray = np.empty(0)


@dataclass
class Bracket:
    """Where the cut of a weight is expected, and how far that has been narrowed."""

    weight: FlatWeight  # the whole; its blocks are those that this process holds
    dtype: torch.dtype
    expected: Stretch = Stretch(*EVERYTHING, NOTHING, np.empty(0), 0, 0, 0.0)
    left: Stretch = expected

    def expect(self, limits: Limits, here: Picked, told: np.ndarray) -> None:
        """Start from limits, what is here, and what all hold above and between, with energy."""
        above, inside, energy = told.tolist()
        below = self.weight.chooseable - int(above) - int(inside)
        self.expected = self.left = Stretch(*limits, *here, below, int(inside), energy)

    def restore(self) -> None:
        """Undo the narrowing."""
        self.left = self.expected

    @property
    def decided(self) -> bool:
        """Whether what is left is little, or all of one magnitude."""
        low, high = _to_grid(np.array(self.left[:2]), self.dtype)
        return self.left.inside <= FEW or high - low <= 1

    def ends_at_the_edge(self, going: int) -> bool:
        """Say whether what was not expected might belong on the other side of the cut."""
        below, inside = self.expected.below, self.expected.inside
        gone = self.left.below - below + going
        above = self.weight.chooseable - below - inside
        return (gone == 0 and below > 0) or (gone == inside and above > 0)

    def narrow(self, look: _Look, low: int, high: int) -> None:
        """Keep what lies between two of the magnitudes that were looked at, or its own ends."""
        here = self.left.here
        magnitude = np.concatenate([[self.left.low], look.pivots, [self.left.high]])
        up_to = np.concatenate([[self.left.below], look.up_to,
                                [self.left.below + self.left.inside]]).astype(int)  # fmt: skip
        energy = np.concatenate([[0.0], look.energy, [self.left.energy]])
        ends = _like(here.values, magnitude[[low, high]])
        start, end = np.searchsorted(here.values, ends, "right")
        inside = here._replace(
            values=here.values[start:end],
            counts=None if here.counts is None else here.counts[start:end],
        )
        self.left = Stretch(float(magnitude[low]), float(magnitude[high]), inside,
                            self.left.upwards[start : end + 1], int(up_to[low]),
                            int(up_to[high] - up_to[low]), float(energy[high]))  # fmt: skip


def narrow(
    groups: Mapping[int, list[Bracket]], counts: Sequence[int], exchange: Exchange
) -> None:
    """Narrow the brackets of all groups, until little is left inside each of them."""
    for _ in range(ROUNDS):
        open_ = [x for of_group in groups.values() for x in of_group if not x.decided]
        if not open_:
            break
        before = [x.left[:2] for x in open_]
        looks = _look([(x, _pivots(x)) for x in open_], exchange)
        known = dict(zip(map(id, open_), looks))
        for i, of_group in groups.items():
            _narrow(of_group, [known.get(id(x), _Look()) for x in of_group], counts[i])
        if [x.left[:2] for x in open_] == before:
            break  # equal magnitudes, which nothing can narrow


def _look(brackets: list[tuple[Bracket, np.ndarray]], exchange: Exchange) -> list[_Look]:
    """Sum counts up to pivots, and energies above them, over all processes."""
    here = [_look_here(x.left, pivots) for x, pivots in brackets]
    told = exchange.add(np.concatenate([x.ravel() for x in here]))
    parts = np.split(told, np.cumsum([x.size for x in here])[:-1])
    return [
        _Look(pivots, *(part.reshape(2, -1) + [[x.left.below], [0.0]]))
        for (x, pivots), part in zip(brackets, parts)
    ]


def _look_here(stretch: Stretch, pivots: np.ndarray) -> np.ndarray:
    values, counts = stretch.here.values, stretch.here.counts
    place = np.searchsorted(values, _like(values, pivots), "right")
    up_to = place if counts is None else np.append(0, counts.cumsum())[place]
    return np.stack([up_to, stretch.upwards[place]])


def _narrow(brackets: list[Bracket], looks: list[_Look], count: int) -> None:
    """Narrow the brackets of a group to where its threshold must lie."""
    shape = len(brackets), PIVOTS + 2
    # Logarithms of the most that entries up to each magnitude score, and of what those
    # above it score at least. What is not known proves nothing.
    most, least = np.full(shape, np.inf), np.full(shape, -np.inf)
    up_to = np.zeros(shape)
    most[:, 0], least[:, -1] = -np.inf, np.inf
    for row, (x, look) in enumerate(zip(brackets, looks)):
        known = slice(1, 1 + len(look.pivots))
        scores = logarithm_of(look.pivots, look.energy, x.weight.scale)
        least[row, known] = scores - SLACK
        most[row, known] = SLACK - np.logaddexp2(0.0, -scores)  # of p^2 / (E + p^2)
        up_to[row, 0], up_to[row, known] = x.left.below, look.up_to
        up_to[row, known.stop :] = x.left.below + x.left.inside
        least[row, known.stop :] = np.inf
    rows = np.arange(len(brackets))
    thresholds = np.unique(np.append(np.concatenate([most.ravel(), least.ravel()]), -np.inf))
    thresholds = thresholds[thresholds < np.inf]

    def surely(threshold: float) -> np.ndarray:
        """Return the last magnitude of each weight up to which all score no more."""
        return (most <= threshold).sum(1) - 1

    def at_most(threshold: float) -> np.ndarray:
        """Return the first magnitude of each weight above which all score more."""
        return (least <= threshold).sum(1)

    too_low = _first(thresholds, lambda x: up_to[rows, at_most(x)].sum() >= count)
    enough = _first(thresholds, lambda x: up_to[rows, surely(x)].sum() >= count)
    lows = surely(thresholds[too_low - 1]) if too_low else np.zeros(len(rows), int)
    last = np.array([1 + len(look.pivots) for look in looks])
    highs = at_most(thresholds[enough]) if enough < len(thresholds) else last
    for x, look, low, high in zip(brackets, looks, lows, np.maximum(lows, highs)):
        if len(look.pivots):
            x.narrow(look, low, high)


def _first(values: np.ndarray, holds: Callable[[float], bool]) -> int:
    """Return the place of the first value for which something holds, as from then on."""
    low, high = 0, len(values)
    while low < high:
        middle = (low + high) // 2
        if holds(values[middle]):
            high = middle
        else:
            low = middle + 1
    return low


def _pivots(bracket: Bracket) -> np.ndarray:
    """Return magnitudes between those of a bracket, evenly spread among all that there are."""
    low, high = _to_grid(np.array(bracket.left[:2]), bracket.dtype).tolist()
    steps = min(PIVOTS + 1, high - low)
    between = [low + (high - low) * i // steps for i in range(1, steps)]
    return _from_grid(np.array(between, np.int64), bracket.dtype)


def _to_grid(magnitude: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """Number the magnitudes of a dtype in order, from zero; what lies below has -1."""
    bits = torch.from_numpy(magnitude).to(dtype).view(INTEGERS[dtype.itemsize])
    return np.where(magnitude < 0, -1, bits.long().numpy())


def _from_grid(number: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    return torch.from_numpy(number).to(INTEGERS[dtype.itemsize]).view(dtype).double().numpy()


def _like(values: np.ndarray, magnitude: np.ndarray) -> np.ndarray:
    """Return magnitudes of a weight in the dtype of its values, which holds them exactly."""
    return magnitude.astype(values.dtype)

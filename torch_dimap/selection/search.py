"""Which entries of a group of layers go, for an exact count, without scoring them all.

Inside a layer the score of :func:`torch_dimap.dimap_scores` falls with the
magnitude, so all there is to find is one magnitude cut per layer. Each layer is read
a few times, in blocks that stay in cache:

1. its energy (sum of squares) and its number of non-zero entries;
2. a sample of it, from which all layers together estimate the group's threshold, and
   each layer a bracket around its own cut;
3. the energy above the bracket, and the few entries inside it, the *candidates*;
4. the mask, written once.

The candidates of all layers are scored and the lowest of them chosen. A sample can
mislead: every layer must end with its cut strictly inside its bracket, or the bracket
is widened (:mod:`torch_dimap.selection.brackets`) and the step repeated. Scores that float64
cannot tell apart are compared in exact integer arithmetic. The result is therefore
that of exact arithmetic, whatever the block size, the number of threads or the device.

Order of removal: lower scores first; among equal scores the later layer first; among
equal magnitudes of one layer the later entry, in row-major order, first.

Scratch: a block, the samples and the candidates (on usual weights about 3 % of the
entries, 20 bytes each; more where many entries tie at the cut).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from itertools import product, repeat
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from torch_dimap.selection import brackets
from torch_dimap.selection.brackets import (
    bracket,
    expected,
    guess_threshold,
    narrow,
    take_sample,
)
from torch_dimap.selection.cuts import Cut, mask_of
from torch_dimap.selection.reading import (
    FlatLayer,
    block_size,
    blocks_of,
    count_true,
    energy_above,
    magnitude_of,
    pick,
    read_layer,
    sort,
    total,
)
from torch_dimap.selection.threads import each_layer


ROW = 1024  # candidates that are added up one after the other
EXACT = 1 << 17  # products of two 18-bit digits whose sum float64 holds without rounding


class _Candidates(NamedTuple):
    """The entries inside a layer's bracket, and how many lie on either side of it."""

    magnitude: Tensor  # descending
    score: Tensor  # float64, each within the relative error of _score_error
    below: int  # non-zero ones only
    above: int


def select(
    weights: Sequence[Tensor], count: int, masks: Sequence[Tensor | None] | None = None
) -> tuple[list[Tensor], float]:
    """Choose the ``count`` entries with the lowest DIMAP scores among several layers.

    Args:
        weights: the layers of one group, finite floating-point tensors of any shapes;
            their dtypes and devices may differ. They are only read.
        count: how many entries to prune.
        masks: for each layer None, or a tensor of its shape that is non-zero where
            the entry may be chosen. All other entries count as zero.

    Returns:
        A boolean mask for each layer, contiguous and on its device, True for what
        stays; and the threshold, the highest score that goes (0.0 if nothing does).

    Raises:
        ValueError: if ``count`` is negative or above the number of entries to choose
            from.
    """
    on_cpu = all(weight.device.type == "cpu" for weight in weights)
    with each_layer(len(weights), on_cpu) as each:
        blocks = list(map(blocks_of, weights, masks or [None] * len(weights)))
        layers = list(each(read_layer, blocks))
        entries = sum(x.zeros + x.nonzeros for x in layers)
        if not 0 <= count <= entries:
            raise ValueError(
                f"select(): count must lie between 0 and the {entries} entries "
                f"to choose from, found {count}."
            )
        cuts, threshold = find_cuts(layers, count, each)
        return list(each(mask_of, weights, blocks, cuts)), threshold


def find_cuts(
    layers: list[FlatLayer],
    count: int,
    each: Callable[..., Iterator] = map,
    candidates: float = math.inf,
) -> tuple[list[Cut], float]:
    """Find the cut of each layer of a group, for ``count`` entries in all, and the threshold.

    The layers are read several times, block by block, and need not lie in memory. Where
    more ``candidates`` than told are to be expected they are read more often, for fewer.
    """
    zeros = sum(x.zeros for x in layers)
    if count <= zeros:
        return _cut_zeros(layers, count), 0.0
    if count == zeros + sum(x.nonzeros for x in layers):
        return [Cut(math.inf, 0, 0)] * len(layers), 1.0
    return _cut_nonzeros(layers, count - zeros, each, candidates)


def _cut_zeros(layers: list[FlatLayer], count: int) -> list[Cut]:
    """Prune ``count`` zeros and nothing else."""
    cuts = []
    for layer in reversed(layers):
        taken = min(layer.zeros, count)
        cuts.append(Cut(0.0, layer.zeros - taken, layer.zeros + layer.nonzeros - taken))
        count -= taken
    return cuts[::-1]


def _cut_nonzeros(
    layers: list[FlatLayer], count: int, each: Callable[..., Iterator], candidates: float
) -> tuple[list[Cut], float]:
    """Prune every zero, and of the rest the ``count`` lowest."""
    wanted = brackets.SAMPLE if candidates == math.inf else brackets.NARROW_SAMPLE
    samples = list(each(take_sample, layers, repeat(wanted)))
    guess = guess_threshold(samples, count)
    margins = [brackets.MARGIN] * len(layers)
    limits = list(map(bracket, samples, repeat(guess), margins))
    finer = samples.copy()
    while (more := sum(map(expected, finer, limits))) > candidates:
        finer = list(each(narrow, layers, finer, limits))
        guess = guess_threshold(finer, count)
        limits = list(map(bracket, finer, repeat(guess), margins))
        if sum(map(expected, finer, limits)) > more / 2:  # ties, which nothing can narrow
            break
    found = list(each(_candidates, layers, limits))
    while True:
        inside = count - sum(c.below for c in found)
        if 0 < inside <= sum(c.score.numel() for c in found):
            chosen, threshold = _lowest(layers, found, inside)
            # The cut must lie between two candidates, or what was not looked at
            # below or above the bracket might belong on the other side of it.
            missed = [
                (n == 0 and c.below > 0) or (n == c.score.numel() and c.above > 0)
                for n, c in zip(chosen, found)
            ]
            if not any(missed):
                return list(map(_cut, layers, found, chosen)), threshold
        else:
            missed = [c.below + c.above > 0 for c in found]
        for i in (i for i, is_missed in enumerate(missed) if is_missed):
            margins[i] *= 4
            before, limits[i] = limits[i], bracket(finer[i], guess, margins[i])
            if limits[i] == before and finer[i] is not samples[i]:  # as wide as it can become
                finer[i], margins[i] = samples[i], brackets.MARGIN
                limits[i] = bracket(finer[i], guess, margins[i])
            found[i] = _candidates(layers[i], limits[i])


def _candidates(layer: FlatLayer, limits: tuple[float, float]) -> _Candidates:
    low, high = limits
    inside, above, energies = [], [], []
    for block in layer.blocks():
        magnitude = magnitude_of(*block)
        over = magnitude > high
        above.append(count_true(over))
        inside.append(pick(magnitude, (magnitude > low).logical_xor_(over)))
        energies.append(energy_above(magnitude, high, layer.scale))
    magnitude = sort(torch.cat(inside)).flip(0)
    square = (magnitude.to(torch.float64) * layer.scale).square_()
    score = square / _running_sum(square).add_(total(energies))
    n_above = int(total(above))
    return _Candidates(magnitude, score, layer.nonzeros - n_above - score.numel(), n_above)


def _running_sum(values: Tensor) -> Tensor:
    """Return ``cumsum(values)`` in rows: no entry goes through more than a few thousand sums."""
    rows = F.pad(values, (0, -values.numel() % ROW)).view(-1, ROW).cumsum(1)
    rows[1:] += rows[:-1, -1].cumsum(0).unsqueeze(1)
    return rows.view(-1)[: values.numel()]


def _score_error(found: list[_Candidates]) -> float:
    """Bound the relative error of the candidates' scores.

    A sum of n positive terms, in any order, errs by less than n units in the last
    place: n is a block, or a row and the number of rows of candidates; the rest is
    square, quotient and joining.
    """
    terms = max(block_size(c.score) + ROW + c.score.numel() // ROW for c in found)
    return (terms + 16) * 2.0**-52


def _lowest(
    layers: list[FlatLayer], found: list[_Candidates], count: int
) -> tuple[list[int], float]:
    """Say how many candidates of each layer are among the ``count`` lowest of all."""
    threshold = _kth_smallest([c.score for c in found], count)
    # Outside this window the scores are surely on their side of the exact threshold.
    # The second term speaks for squares that underflow.
    slack = 2 * _score_error(found) * threshold + 2.0**-1000
    at_least = [c.score < threshold - slack for c in found]
    at_most = [c.score <= threshold + slack for c in found]
    sure = [int(flags.count_nonzero()) for flags in at_least]
    open_ = [int(flags.count_nonzero()) - n for flags, n in zip(at_most, sure)]
    missing = count - sum(sure)
    if sum(n > 0 for n in open_) == 1:
        settled = [missing if n else 0 for n in open_]
    else:
        settled = _settle_exactly(layers, found, sure, open_, missing)
    return [n + more for n, more in zip(sure, settled)], threshold


def _settle_exactly(
    layers: list[FlatLayer],
    found: list[_Candidates],
    sure: list[int],
    open_: list[int],
    count: int,
) -> list[int]:
    """Share ``count`` out among candidates whose scores float64 cannot tell apart."""
    ranked = []
    for i, (layer, c) in enumerate(zip(layers, found)):
        last = c.score.numel() - sure[i]
        values = c.magnitude[last - open_[i] : last].tolist()
        if values:
            ties = int((c.magnitude[: last - open_[i]] == values[0]).count_nonzero())
            energy = _exact_energy(layer, values[0]) + ties * Fraction(values[0]) ** 2
        for rank, value in enumerate(values):
            square = Fraction(value) ** 2
            energy += square
            ranked.append((square / energy, -i, -rank))
    chosen = [0] * len(layers)
    for _, i, _ in sorted(ranked)[:count]:
        chosen[-i] += 1
    return chosen


def _exact_energy(layer: FlatLayer, above: float) -> Fraction:
    """Sum the unscaled squares of all magnitudes greater than ``above``, without rounding."""
    energy = Fraction(0)
    for block in layer.blocks():
        magnitude = magnitude_of(*block)
        for part in magnitude[magnitude > above].split(EXACT):
            mantissa, exponent = torch.frexp(part.to(torch.float64))
            exponents, place = exponent.unique(return_inverse=True)
            integer = (mantissa * 2.0**53).long()
            digits = [(integer >> 18 * i & 2**18 - 1).double() for i in range(3)]
            for i, j in product(range(3), repeat=2):
                sums = torch.bincount(place, weights=digits[i] * digits[j]).tolist()
                for e, units in zip(exponents.tolist(), sums):
                    energy += int(units) * Fraction(2) ** (18 * (i + j) + 2 * (e - 53))
    return energy


def _cut(layer: FlatLayer, candidates: _Candidates, pruned: int) -> Cut:
    """Cut a layer so that its ``pruned`` lowest candidates, and all below, go."""
    kept = layer.nonzeros - candidates.below - pruned
    if pruned == 0:
        return Cut(0.0, 0, kept)
    staying = candidates.magnitude[:-pruned]
    magnitude = candidates.magnitude[-pruned]
    return Cut(magnitude.item(), int((staying == magnitude).count_nonzero()), kept)


def _kth_smallest(vectors: list[Tensor], k: int) -> float:
    """Return the k-th smallest (k from 1) of all values of several vectors."""
    pooled = torch.cat([v.to(vectors[0].device) for v in vectors])
    if pooled.device.type != "cpu":
        return pooled.kthvalue(k).values.item()
    return float(np.partition(pooled.numpy(), k - 1)[k - 1])

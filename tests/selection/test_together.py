"""The search in several processes, played by threads, beside that of the whole weights."""

from __future__ import annotations

import random
import threading

import numpy as np
import pytest
import torch

from torch_dimap.selection import (
    blocks_of,
    find_cuts_together,
    mask_of,
    proving,
    read_together,
    select,
    together,
)
from torch_dimap.selection.exchange import Part, add_exactly
from torch_dimap.selection.ties import Held, share_ties

SHAPES = [(7,), (3, 5), (40, 30), (128, 129), (300, 200), (1,), (0,)]
DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.float16]


class Table:
    """Where threads lay what they tell one another."""

    def __init__(self, processes):
        self.barrier = threading.Barrier(processes, timeout=60)
        self.slots = [None] * processes
        self.calls = 0


class Thread:
    """One of the processes."""

    def __init__(self, table, rank):
        self.table, self.rank, self.processes = table, rank, len(table.slots)

    def _all(self, value):
        self.table.slots[self.rank] = value
        self.table.calls += self.rank == 0
        self.table.barrier.wait()
        told = list(self.table.slots)
        self.table.barrier.wait()
        return told

    def gather(self, parts):
        return [list(of_all) for of_all in zip(*self._all(list(parts)))]

    def add(self, numbers):
        return sum(self._all(numbers))

    def least(self, numbers):
        return np.min(self._all(numbers), axis=0)


class Places:
    """Entries of a part, anywhere in the whole."""

    def __init__(self, places, size):
        self.places, self.size = places, size

    def of(self, entries):
        return self.places[entries]


def in_threads(processes, work):
    table, results, errors = Table(processes), [None] * processes, []

    def run(rank):
        try:
            results[rank] = work(Thread(table, rank), rank)
        except BaseException as error:
            if not isinstance(error, threading.BrokenBarrierError):
                errors.append(error)
            table.barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(processes)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results, table.calls


def select_together(weights, masks, groups, counts, processes, rng):
    """Spread the entries of weights over processes, and choose there; join the masks."""
    spread = []
    for weight in weights:
        owners = rng.choice([  # in one piece each, anywhere, or all in one process
            np.arange(weight.numel()) * processes // max(1, weight.numel()),
            np.random.default_rng(0).integers(0, processes, weight.numel()),
            np.zeros(weight.numel(), int),
        ])  # fmt: skip
        spread.append([np.flatnonzero(owners == rank) for rank in range(processes)])

    def work(exchange, rank):
        places = [of_all[rank] for of_all in spread]
        parts = [w.reshape(-1)[torch.from_numpy(at)] for w, at in zip(weights, places)]
        own = [None if m is None else m.reshape(-1)[torch.from_numpy(at)]
               for m, at in zip(masks, places)]  # fmt: skip
        blocks = list(map(blocks_of, parts, own))
        dtypes, names = zip(*((x.dtype, f"weight {i}") for i, x in enumerate(weights)))
        flat = read_together(blocks, dtypes, names, exchange)
        results = find_cuts_together(
            [[flat[i] for i in group] for group in groups],
            [[weights[i].dtype for i in group] for group in groups], counts, exchange,
        )  # fmt: skip
        cuts = [cut for of_group, _ in results for cut in of_group]
        held = [Held(b, Places(at, w.numel()), True) for b, at, w in zip(blocks, places, weights)]
        keeps = map(mask_of, parts, blocks, share_ties(cuts, held, exchange))
        return list(keeps), [threshold for _, threshold in results]

    results, calls = in_threads(processes, work)
    joined = []
    for i, weight in enumerate(weights):
        keep = torch.empty(weight.numel(), dtype=torch.bool)
        for rank in range(processes):
            keep[torch.from_numpy(spread[i][rank])] = results[rank][0][i]
        joined.append(keep.view(weight.shape))
    assert all(thresholds == results[0][1] for _, thresholds in results)
    return joined, results[0][1], calls


def random_weight(rng, generator):
    shape, dtype = rng.choice(SHAPES), rng.choice(DTYPES)
    weight = torch.randn(shape, generator=generator, dtype=torch.float64)
    kind = rng.randrange(6)
    if kind == 1:
        weight = weight**7
    elif kind == 2:
        weight = (weight * 2).round()
    elif kind == 3:
        weight = torch.where(torch.rand(shape, generator=generator) < 0.5, 0.0, weight)
    elif kind == 4 and dtype == torch.float64:
        weight = weight * 10.0 ** rng.choice([-170, 150, -320])
    elif kind == 5:
        weight = torch.full(shape, 0.5)
    weight = weight.to(dtype)
    return torch.where(weight.isfinite(), weight, 1.0).to(dtype)


def compare(seed):
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    weights = [random_weight(rng, generator) for _ in range(rng.randint(1, 6))]
    masks = [None if rng.random() < 0.5 else torch.rand(w.shape, generator=generator) < 0.6
             for w in weights]  # fmt: skip
    ends = sorted({len(weights), *rng.choices(range(1, len(weights) + 1), k=2)})
    groups = [list(range(a, b)) for a, b in zip([0, *ends], ends)]
    counts = []
    for group in groups:
        entries = sum(weights[i].numel() if masks[i] is None else int(masks[i].sum())
                      for i in group)  # fmt: skip
        counts.append(rng.choice([0, entries, entries // 2, rng.randint(0, entries)]))
    found, thresholds, _ = select_together(
        weights, masks, groups, counts, rng.randint(1, 4), rng
    )
    for group, count, threshold in zip(groups, counts, thresholds):
        keeps, expected = select(
            [weights[i] for i in group], count, [masks[i] for i in group]
        )
        assert threshold == expected, seed
        assert all(torch.equal(keep, found[i]) for keep, i in zip(keeps, group)), seed


@pytest.mark.parametrize("first", range(0, 200, 50))
def test_cuts_and_thresholds_are_those_of_the_whole_weights(first):
    for seed in range(first, first + 50):
        compare(seed)


@pytest.mark.parametrize(("sample", "few", "pivots"), [(4, 1, 1), (16, 4, 3), (64, 10**6, 15)])
def test_cuts_do_not_depend_on_how_they_are_searched_for(sample, few, pivots, monkeypatch):
    monkeypatch.setattr(together, "SAMPLE", sample)
    monkeypatch.setattr(proving, "FEW", few)
    monkeypatch.setattr(proving, "PIVOTS", pivots)
    for seed in range(200, 225):
        compare(seed)


def test_exchanges_do_not_grow_with_weights_or_groups():
    generator = torch.Generator().manual_seed(0)
    calls = []
    for layers in (2, 40):
        weights = [torch.randn(50, 60, generator=generator) for _ in range(layers)]
        groups = [[i] for i in range(layers)]
        *_, count = select_together(
            weights, [None] * layers, groups, [1500] * layers, 2, random.Random(0)
        )
        calls.append(count)
    assert calls[1] <= calls[0] + 2


def test_what_is_not_finite_in_one_part_is_refused_by_all():
    def work(exchange, rank):
        part = torch.tensor([1.0, float("nan") if rank == 1 else 2.0])
        with pytest.raises(ValueError, match="the weight holds NaN or infinite"):
            read_together([blocks_of(part, None)], [part.dtype], ["the weight"], exchange)
        return True

    assert all(in_threads(3, work)[0])


def test_exact_sums_survive_the_way():
    from fractions import Fraction

    numbers = [Fraction(2) ** 900 + Fraction(1, 2**1000), Fraction(0), Fraction(3, 8)]

    def work(exchange, rank):
        return add_exactly(numbers, exchange)

    results, _ = in_threads(2, work)
    assert results[0] == results[1] == [2 * number for number in numbers]
    assert Part().counts is None

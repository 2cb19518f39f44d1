"""Equal magnitudes: the same entries as by the slow definition, at hardly more cost."""

from __future__ import annotations

import time
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle import select_exactly

from torch_dimap.selection import exact, reading, runs, search

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
MILLION = 10**6


def tied(kind: str) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    dtype = torch.float64 if kind.startswith("float64") else torch.float32
    weights = [torch.randn(MILLION, generator=generator, dtype=dtype) for _ in range(2)]
    for weight in weights:
        if kind == "half of each":
            weight[::2] = 0.3
        elif kind == "all, behind a giant":
            weight.fill_(1.0)[0] = 2.0**60
        elif kind == "zeros":
            weight[: MILLION * 6 // 10] = 0.0
        elif kind == "float64, squares underflow":
            weight.mul_(1e-170)[0] = 1.0
        elif kind == "float64, within rounding":
            weight.mul_(1e-14).add_(0.3)
    if kind == "copies":
        weights[0][::2] = 0.3
        weights[1] = weights[0].clone()
    return weights


@pytest.mark.parametrize(
    "kind",
    ["half of each", "copies", "all, behind a giant", "zeros", "float64, squares underflow",
     "float64, within rounding"],
)  # fmt: skip
def test_select_is_quick_where_magnitudes_or_scores_are_equal(kind):
    weights = tied(kind)
    begin = time.perf_counter()
    keeps, threshold = search.select(weights, MILLION)
    assert time.perf_counter() - begin < 6  # one by one they took half a minute
    assert sum(int(keep.sum()) for keep in keeps) == MILLION
    for keep, weight in zip(keeps, weights):
        assert weight.abs()[~keep].max() <= weight.abs()[keep].min()
        edge = (weight.abs() == weight.abs()[~keep].max()).nonzero().squeeze(1)
        flags = keep[edge].int()
        assert (flags.diff() <= 0).all()  # of equal ones the later go first


@st.composite
def repeated(draw):
    """Draw layers of few magnitudes, each of them many times."""
    dtype = draw(st.sampled_from(DTYPES))
    value = st.sampled_from([0.0, 1.0, -1.0, 2.0, 3.0, 2.0**-14, 60000.0, 2.0**-20])
    if dtype in (torch.float32, torch.float64):
        value = st.one_of(value, st.sampled_from([2.0**60, 2.0**-60]))
    if dtype == torch.float64:
        value = st.one_of(value, st.sampled_from([1e-170, 3e-170, 5e-324, 1e300]))
    run = st.tuples(value, st.integers(1, 25)).map(lambda x: [x[0]] * x[1])
    layer = st.lists(run, max_size=3).map(lambda found: sum(found, []))
    layers = draw(st.lists(layer, min_size=1, max_size=4))
    if draw(st.booleans()):
        layers = layers[:1] * len(layers)
    weights = [torch.tensor(draw(st.permutations(x)), dtype=dtype) for x in layers]
    masks = None
    if draw(st.booleans()):
        bits = st.integers(0, 2**80 - 1)
        masks = [torch.tensor([b >> i & 1 for i in range(len(w))], dtype=torch.bool)
                 for w, b in ((w, draw(bits)) for w in weights)]  # fmt: skip
    total = sum(map(len, layers)) if masks is None else int(sum(m.sum() for m in masks))
    return weights, draw(st.integers(0, total)), masks


@pytest.fixture(params=[1 << 18, 3])
def held(request, monkeypatch):
    """Merge equal magnitudes never, or as soon as there are a few."""
    monkeypatch.setattr(runs, "HELD", request.param)
    monkeypatch.setattr(reading, "CPU_BLOCK", 16 if request.param == 3 else reading.CPU_BLOCK)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(group=repeated())
def test_select_equals_the_exact_double_loop_where_magnitudes_repeat(held, group):
    weights, count, masks = group
    keeps, threshold = search.select(weights, count, masks)
    expected, expected_threshold = select_exactly(weights, count, masks)
    assert all(torch.equal(keep, want) for keep, want in zip(keeps, expected, strict=True))
    assert threshold == pytest.approx(expected_threshold, rel=1e-12, abs=1e-300)


def test_select_shares_among_many_equal_layers(held):
    weights = [torch.tensor([1.0, 1.0, 2.0**30, 1.0])] * 60
    for count in (1, 61, 100, 179, 181):
        keeps, _ = search.select(weights, count)
        expected, _ = select_exactly(weights, count)
        assert all(torch.equal(keep, want) for keep, want in zip(keeps, expected))


@pytest.mark.parametrize("dtype", DTYPES)
def test_exact_energy_rounds_nothing(dtype):
    generator = torch.Generator().manual_seed(2)
    weight = (torch.randn(3000, generator=generator, dtype=torch.float64) ** 9).to(dtype)
    weight = weight[weight.isfinite()]
    expected = sum(Fraction(x) ** 2 for x in weight.tolist() if abs(x) > 0.5)
    flat = reading.read_weight(reading.blocks_of(weight, None), "weight")
    assert exact.exact_energy(flat.blocks, 0.5) == expected


def test_sum_of_squares_rounds_nothing_in_the_whole_range_of_float64():
    generator = np.random.default_rng(0)
    values = np.ldexp(generator.random(2000), generator.integers(-1074, 1025, 2000))
    values = np.append(values, [5e-324, 1.7e308, 0.0, 1e-170, 1 + 2.0**-52])
    assert exact.sum_of_squares(values) == sum(Fraction(x) ** 2 for x in values.tolist())
    assert exact.sum_of_squares(values[:0]) == 0

"""The fast selection against the slow definitions, ties and odd inputs included."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import select_by_sorting, select_exactly

from torch_dimap.selection import brackets, reading, runs
from torch_dimap.selection import search as selection

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
DEVICES = [
    "cpu",
    pytest.param(
        "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
    ),
]


@pytest.fixture(params=["usual", "small", "misled"], autouse=True)
def machinery(request, monkeypatch):
    """Run every test with usual settings, with tiny blocks, and with brackets that miss."""
    if request.param != "usual":
        monkeypatch.setattr(reading, "CPU_BLOCK", 5)
        monkeypatch.setattr(reading, "DEVICE_BLOCK", 7)
        monkeypatch.setattr(brackets, "SAMPLE", 8)
        monkeypatch.setattr(runs, "HELD", 4)
    if request.param == "misled":
        monkeypatch.setattr(selection, "MARGIN", 1e-3)


def assert_selects_like(oracle, weights, count, masks=None):
    keeps, threshold = selection.select(weights, count, masks)
    expected, expected_threshold = oracle(weights, count, masks)
    for keep, want, weight in zip(keeps, expected, weights, strict=True):
        assert keep.dtype == torch.bool and keep.shape == weight.shape
        assert torch.equal(keep.cpu(), want.cpu())
    assert threshold == pytest.approx(expected_threshold, rel=1e-9, abs=1e-300)


# Few distinct values bring ties; powers of two across a wide range bring scores that
# float64 cannot tell apart.
VALUES = st.one_of(
    st.integers(-3, 3).map(float),
    st.floats(-8, 8, width=16),
    st.integers(-14, 13).map(lambda e: 2.0**e),
)


@st.composite
def groups(draw):
    dtype = draw(st.sampled_from(DTYPES))
    layers = draw(st.lists(st.lists(VALUES, max_size=12), min_size=1, max_size=4))
    if draw(st.booleans()):
        layers = [layers[0]] * len(layers)
    factors = draw(st.lists(st.sampled_from([1, 3, 1 / 3, 1e-3]), min_size=len(layers)))
    weights = [torch.tensor(v, dtype=torch.float64) * f for v, f in zip(layers, factors)]
    weights = [weight.to(dtype) for weight in weights]
    masks = None
    if draw(st.booleans()):
        masks = [torch.tensor([draw(st.booleans()) for _ in v], dtype=torch.bool) for v in layers]
    total = sum(map(len, layers)) if masks is None else int(sum(m.sum() for m in masks))
    return weights, draw(st.integers(0, total)), masks


@settings(max_examples=300, deadline=None)
@given(groups())
def test_select_equals_the_exact_double_loop(group):
    assert_selects_like(select_exactly, *group)


LARGE = {
    "gaussian": lambda n, g: torch.randn(n, generator=g),
    "heavy-tailed": lambda n, g: torch.randn(n, generator=g) ** 9,
    "constant": lambda n, g: torch.full((n,), 0.3),
    "two-valued": lambda n, g: torch.randint(0, 2, (n,), generator=g) + 0.5,
    "integers": lambda n, g: torch.randint(-9, 10, (n,), generator=g).float(),
    "sparse": lambda n, g: torch.randn(n, generator=g) * (torch.rand(n, generator=g) < 0.1),
    "denormal": lambda n, g: torch.randn(n, generator=g) * 1e-41,
    "huge": lambda n, g: torch.randn(n, generator=g) * 1e37,
    "tiny": lambda n, g: torch.randn(n, generator=g) * 1e-30,
    "bfloat16": lambda n, g: torch.randn(n, generator=g).bfloat16(),
    "float16": lambda n, g: torch.randn(n, generator=g).half(),
    "float64": lambda n, g: torch.randn(n, generator=g, dtype=torch.float64) * 1e-200,
}
SIZES = {"alike": [2000, 3000, 1000], "one giant, many tiny": [5000] + [3] * 40}


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("kind", LARGE)
def test_select_equals_sorting_on_many_distributions(kind, sizes):
    if reading.CPU_BLOCK < 1000:  # as many blocks of these as are worth their time
        sizes = [max(3, n // 10) for n in sizes]
    generator = torch.Generator().manual_seed(7)
    scales = [1.0, 1.7, 0.6]  # none of them makes one layer's scores another's
    weights = [
        (LARGE[kind](n, generator) * scales[i % 3]).to(LARGE[kind](1, generator).dtype)
        for i, n in enumerate(sizes)
    ]
    if kind in ("constant", "two-valued"):  # exact ties between layers: float64 sums blur them
        weights = [w * 0 + w.sign() * (1 + w.abs().floor()) for w in weights]
    total = sum(sizes)
    for count in (0, 1, total // 3, total // 2, total - 1, total):
        assert_selects_like(select_by_sorting, weights, count)


def test_select_equals_sorting_on_a_million_entries_with_ties(machinery):
    if reading.CPU_BLOCK < 1000:
        pytest.skip("the tiny blocks of the other settings would take minutes")
    generator = torch.Generator().manual_seed(3)
    weights = [
        (torch.randn(n, generator=generator) * scale).to(dtype)
        for n, scale, dtype in [
            (400_000, 0.02, torch.bfloat16),
            (300_001, 0.05, torch.float32),
            (250_000, 0.01, torch.bfloat16),
            (50_000, 3.0, torch.float16),
        ]
    ]
    masks = [None, torch.rand(300_001, generator=generator) < 0.5, None, None]
    for count in (1, 100_000, 450_000, 849_000):
        assert_selects_like(select_by_sorting, weights, count, masks)


def test_select_tells_apart_what_float64_cannot():
    # Behind 2^60 every entry scores 2^-120 to the last bit, and one by one a little less:
    # exact arithmetic takes the last entry of each layer, later layers first.
    layer = torch.tensor([2.0**60, 1.0, 1.0])
    keeps, _ = selection.select([layer, layer.clone()], 2)
    assert [keep.tolist() for keep in keeps] == [[True, True, False]] * 2
    keeps, _ = selection.select([layer, layer.clone()], 1)
    assert [keep.tolist() for keep in keeps] == [[True, True, True], [True, True, False]]


def test_select_takes_equal_scores_from_the_last_layer_and_entry():
    keeps, threshold = selection.select([torch.zeros(2), torch.zeros(2), torch.ones(1)], 3)
    assert [keep.tolist() for keep in keeps] == [[True, False], [False, False], [True]]
    assert threshold == 0.0


def test_select_ranks_float64_entries_whose_squares_underflow():
    layer = torch.tensor([1e300, 1e-300, 3e-300, 2e-300], dtype=torch.float64)
    for count, kept in [(1, [1, 0, 1, 1]), (2, [1, 0, 1, 0]), (3, [1, 0, 0, 0])]:
        assert selection.select([layer], count)[0][0].int().tolist() == kept


@pytest.mark.parametrize("giant", [1e300, 1e-10])
def test_select_ranks_float64_entries_beside_a_masked_giant(giant):
    layer = torch.tensor([giant, 1.0, 2.0, 3.0], dtype=torch.float64)
    layer[1:] *= giant * 1e-290 * 1e-20  # whose squares would underflow beside the giant's
    masks = [torch.tensor([False, True, True, True]), None]
    for count in range(7):
        assert_selects_like(select_exactly, [layer, torch.tensor([1.0, 2.0, 3.0])], count, masks)


def test_select_takes_no_part_in_a_default_device():
    weight = torch.arange(6.0, dtype=torch.float64)
    with torch.device("meta"):
        (keep,), _ = selection.select([weight], 4)
    assert keep.tolist() == [False] * 4 + [True] * 2


@pytest.mark.parametrize("device", DEVICES)
def test_select_is_the_same_for_any_block_size_threads_and_device(device, monkeypatch):
    generator = torch.Generator().manual_seed(5)
    weights = [torch.randn(n, generator=generator).bfloat16() for n in (700, 900)]
    expected, _ = selection.select(weights, 800)
    threads = torch.get_num_threads()
    try:
        for block, n_threads in [(3, 1), (64, 2), (1 << 20, 1)]:
            monkeypatch.setattr(reading, "CPU_BLOCK", block)
            monkeypatch.setattr(reading, "DEVICE_BLOCK", block)
            torch.set_num_threads(n_threads)
            keeps, _ = selection.select([weight.to(device) for weight in weights], 800)
            assert all(torch.equal(a.cpu(), b) for a, b in zip(keeps, expected))
    finally:
        torch.set_num_threads(threads)


def test_select_reads_any_strides():
    weight = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    (keep,), _ = selection.select([weight.t()], 20)
    (expected,), _ = selection.select([weight.t().contiguous()], 20)
    assert torch.equal(keep, expected)


@pytest.mark.parametrize("count", [-1, 5, math.inf])
def test_select_refuses_a_count_that_is_not_there(count):
    with pytest.raises(ValueError, match="between 0 and the 4 entries"):
        selection.select([torch.ones(4)], count)

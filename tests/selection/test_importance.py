"""dimap_scores: Eq. 10, entry by entry."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from torch_dimap import dimap_scores

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def test_dimap_scores_by_hand():
    weight = torch.tensor([[3.0, -4.0], [0.0, 12.0]])
    expected = torch.tensor([[9 / 169, 16 / 160], [0.0, 1.0]], dtype=torch.float64)
    torch.testing.assert_close(dimap_scores(weight), expected, rtol=1e-15, atol=0)


def test_dimap_scores_gives_the_first_of_equal_magnitudes_the_higher_score():
    scores = dimap_scores(torch.tensor([-1.0, 1.0, 1.0]))
    torch.testing.assert_close(scores, torch.tensor([1, 1 / 2, 1 / 3], dtype=torch.float64))


@given(
    st.lists(st.floats(-1e3, 1e3, width=16), max_size=30),
    st.sampled_from(DTYPES),
)
def test_dimap_scores_equals_a_double_loop(values, dtype):
    weight = torch.tensor(values, dtype=dtype)
    squares = [value**2 for value in weight.tolist()]
    order = sorted(range(len(squares)), key=lambda i: (-squares[i], i))
    expected = [0.0] * len(squares)
    for rank, i in enumerate(order):
        energy = sum(squares[j] for j in order[: rank + 1])
        expected[i] = squares[i] / energy if energy else 0.0
    expected = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(dimap_scores(weight), expected, rtol=1e-13, atol=1e-300)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dimap_scores_largest_is_exactly_one_in_every_dtype(dtype):
    weight = torch.randn(64, 33, generator=torch.Generator().manual_seed(0)).to(dtype)
    scores = dimap_scores(weight)
    assert scores.dtype == torch.float64 and scores.shape == weight.shape
    assert scores.max() == 1.0 and scores.flatten()[weight.abs().argmax()] == 1.0


@pytest.mark.parametrize("scale", [1e-320, 1e-200, 1e200, 1e308])
def test_dimap_scores_do_not_depend_on_the_scale_of_a_layer(scale):
    weight = torch.tensor([0.5, -0.25, 0.125], dtype=torch.float64)
    scaled = torch.tensor([v * scale for v in weight.tolist()], dtype=torch.float64)
    rtol = 1e-3 if scale < 1e-300 else 1e-12  # denormals keep a few bits only
    torch.testing.assert_close(dimap_scores(scaled), dimap_scores(weight), rtol=rtol, atol=0)


def test_dimap_scores_of_zeros_are_zero():
    assert torch.equal(dimap_scores(torch.zeros(3, 2)), torch.zeros(3, 2, dtype=torch.float64))


@pytest.mark.parametrize("shape", [(0,), (3, 0), (), (1,), (2, 3, 4, 5)])
def test_dimap_scores_keeps_any_shape(shape):
    assert dimap_scores(torch.ones(shape)).shape == shape


def test_dimap_scores_reads_any_strides_and_leaves_the_weight_alone():
    weight = torch.randn(8, 6, requires_grad=True)
    before = weight.detach().clone()
    assert torch.equal(dimap_scores(weight.t()), dimap_scores(weight.t().contiguous()))
    assert torch.equal(weight, before) and weight.grad is None


@pytest.mark.parametrize(
    ("weight", "error", "message"),
    [
        ([1.0], TypeError, "must be a tensor, found list"),
        (torch.ones(2, dtype=torch.int32), TypeError, "found torch.int32"),
        (torch.ones(2, dtype=torch.complex64), TypeError, "found torch.complex64"),
        (torch.ones(2, device="meta"), ValueError, "meta device"),
        (torch.tensor([1.0, float("nan")]), ValueError, "NaN or infinite"),
        (torch.tensor([1.0, -float("inf")]), ValueError, "NaN or infinite"),
    ],
)
def test_dimap_scores_refuses(weight, error, message):
    with pytest.raises(error, match=message):
        dimap_scores(weight)

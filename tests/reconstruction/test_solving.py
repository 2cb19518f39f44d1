"""The fast solver against exact solutions, row by row."""

from __future__ import annotations

import pytest
import torch

from torch_dimap.reconstruction import solve_exactly, solve_masked

COLUMNS, ROWS = 24, 12


def make_inputs(kind, tokens):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(tokens, COLUMNS, dtype=torch.float64, generator=generator)
    if kind == "correlated":
        x = x.cumsum(1) + 3.0
    elif kind == "rank-deficient":
        x = x[:, :4] @ torch.randn(4, COLUMNS, dtype=torch.float64, generator=generator)
    elif kind == "dead":
        x[:, ::3] = 0.0
    elif kind == "constant":
        x = x[:1].expand(tokens, -1)
    elif kind == "tiny":
        x = x * 1e-6
    return x


def make_problem(kind="correlated", tokens=200, density=0.5, damping=0.01, drift=0.1):
    """Return what a solver takes, and a function that gives a solution's sum of squares."""
    generator = torch.Generator().manual_seed(4)
    x = make_inputs(kind, tokens)
    wanted = x * (1 + drift * torch.randn(x.shape, dtype=torch.float64, generator=generator))
    weight = torch.randn(ROWS, COLUMNS, dtype=torch.float64, generator=generator)
    keep = torch.rand(ROWS, COLUMNS, generator=generator) < density
    keep[0], keep[1] = False, True
    error = wanted @ weight.t() - x @ (weight * keep).t()
    moments = x.t() @ x
    ridge = damping * moments.diagonal().mean().expand(COLUMNS)

    def left(change):
        return float((error - x @ change.t()).square().sum() + (ridge * change**2).sum())

    return (moments, error.t() @ x, keep, ridge), left


@pytest.mark.parametrize(
    "kind", ["independent", "correlated", "rank-deficient", "dead", "constant", "tiny"]
)
@pytest.mark.parametrize("tokens", [1, 20, 2000])
@pytest.mark.parametrize("density", [0.1, 0.5, 1.0])
def test_solve_masked_is_within_a_thousandth_of_the_exact_solution(kind, tokens, density):
    problem, left = make_problem(kind, tokens, density)
    start = left(torch.zeros(ROWS, COLUMNS, dtype=torch.float64))
    exact, fast = left(solve_exactly(*problem)), left(solve_masked(*problem, start))
    assert exact <= fast * (1 + 1e-9)
    assert fast <= 1.001 * exact + 1e-9 * start


@pytest.mark.parametrize("damping", [1e-4, 1.0])
def test_solve_masked_serves_little_and_much_damping(damping):
    problem, left = make_problem(damping=damping)
    start = left(torch.zeros(ROWS, COLUMNS, dtype=torch.float64))
    assert left(solve_masked(*problem, start)) <= 1.001 * left(solve_exactly(*problem))


def test_solve_masked_changes_kept_weights_only():
    problem, left = make_problem()
    change = solve_masked(*problem, 1e6)
    assert not change[~problem[2]].any()
    assert change[problem[2]].all()


def test_solve_masked_finds_nothing_to_do_where_nothing_lacks():
    moments, gradient, keep, ridge = make_problem()[0]
    assert not solve_masked(moments, torch.zeros_like(gradient), keep, ridge, 0.0).any()


def test_solve_exactly_is_least_squares_by_hand():
    # One row, two kept inputs of three: (H + 1) d = g on these.
    moments = torch.diag(torch.tensor([1.0, 3.0, 7.0], dtype=torch.float64))
    gradient = torch.tensor([[4.0, 8.0, 5.0]], dtype=torch.float64)
    keep = torch.tensor([[True, True, False]])
    change = solve_exactly(moments, gradient, keep, torch.ones(3, dtype=torch.float64))
    torch.testing.assert_close(change, torch.tensor([[2.0, 2.0, 0.0]], dtype=torch.float64))

"""The multiplier climbs while the target is missed, and the rule that ends a training."""

from __future__ import annotations

import math

import pytest
import torch

from torch_dimap.learning import HeldCost, stands_still


def follow(held, steps, pull=1.0):
    """Train one share, which the task pulls up, under a held cost; return it at the end."""
    logit = torch.tensor(2.0, requires_grad=True)
    optimizer = torch.optim.Adam([logit], lr=0.05)
    for _ in range(steps):
        share = logit.sigmoid()
        optimizer.zero_grad()
        (held.penalty(share) - pull * share).backward()
        optimizer.step()
        held.update(share.item())
    return logit.sigmoid().item()


def test_penalty_is_the_square_and_the_multiplier():
    held = HeldCost(0.5, beta=10.0)
    held.gamma = -2.0
    share = torch.tensor(0.75, requires_grad=True)
    penalty = held.penalty(share)
    penalty.backward()
    assert penalty.item() == 10 * 0.25**2 + 2 * 0.25
    assert share.grad.item() == 2 * 10 * 0.25 + 2  # presses the share down


@pytest.mark.parametrize("target", [0.3, 0.9])
@pytest.mark.parametrize("pull", [-1.0, 1.0])
def test_target_is_held_against_a_pull_on_either_side(target, pull):
    held = HeldCost(target, eta=0.2)
    assert follow(held, 1500, pull) == pytest.approx(target, abs=0.01)
    assert held.stands_still()
    assert math.copysign(1, held.gamma) == -math.copysign(1, pull)


def test_square_alone_misses_the_target():
    assert follow(HeldCost(0.3, eta=1e-9), 1500, pull=1.0) > 0.32


def test_multiplier_that_descends_runs_away():
    held = HeldCost(0.6)
    held.eta = -0.5
    assert follow(held, 1500, pull=0.0) > 0.99


def test_update_moves_the_multiplier_towards_more_pressure():
    held = HeldCost(0.5, eta=0.1)
    held.update(0.9)
    assert held.gamma == pytest.approx(-0.04)
    held.update(0.1)
    assert held.gamma == pytest.approx(0.0)


def test_stands_still_needs_a_full_window_near_the_target():
    held = HeldCost(0.5, tolerance=0.01, window=3)
    for share, still in ((0.5, False), (0.504, False), (0.496, True), (0.52, False)):
        held.update(share)
        assert held.stands_still() is still


def test_stands_still_tells_a_drift_from_rest():
    drift = [0.5 + 0.004 * i for i in range(6)]
    assert not stands_still(drift, window=6, tolerance=0.01)
    assert stands_still(drift[:3], window=3, tolerance=0.01)


def test_state_goes_on_where_it_was():
    first, second = HeldCost(0.3, window=4), HeldCost(0.3, window=4)
    for share in (0.9, 0.7, 0.305, 0.3, 0.3):
        first.update(share)
    second.load_state_dict(first.state_dict())
    for held in (first, second):
        held.update(0.3)
    assert second.state_dict() == first.state_dict()
    assert second.stands_still() is first.stands_still() is True


@pytest.mark.parametrize(
    "arguments, error, words",
    [
        ({"target": 1.0}, ValueError, "target must lie between 0 and 1"),
        ({"target": float("nan")}, ValueError, "target must lie between 0 and 1"),
        ({"target": "half"}, TypeError, "target must be a number, found str"),
        ({"target": 0.5, "eta": 0}, ValueError, "eta and tolerance above 0"),
        ({"target": 0.5, "beta": float("inf")}, ValueError, "all finite"),
        ({"target": 0.5, "window": 0}, ValueError, "window must be 1 or more"),
        ({"target": 0.5, "window": 2.0}, TypeError, "window must be an int"),
    ],
)
def test_held_cost_refuses(arguments, error, words):
    with pytest.raises(error, match=words):
        HeldCost(**arguments)


def test_held_cost_refuses_a_share_that_is_no_number():
    held = HeldCost(0.5)
    with pytest.raises(ValueError, match="share must be finite, found nan"):
        held.update(math.nan)
    assert held.state_dict() == {"gamma": 0.0, "shares": []}


def test_load_state_dict_refuses_what_is_none():
    with pytest.raises(ValueError, match="found model"):
        HeldCost(0.5).load_state_dict({"model": {}})


def test_stands_still_needs_a_window():
    with pytest.raises(ValueError, match="window must be 1 or more, found 0"):
        stands_still([1.0], 0, 0.1)

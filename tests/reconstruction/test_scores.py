"""Scores from what layers see, on layers where they can be worked out."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from torch_dimap import (
    global_module_aware_unstructured,
    group_parameters,
    sparsegpt_scores,
    wanda_scores,
)


def test_wanda_scores_are_magnitude_times_rms_of_the_input():
    net = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3))
    x = torch.randn(50, 6) * torch.arange(6)
    hidden = net[0](x).relu()
    scores = wanda_scores(net, x.split(20), [(net[0], "weight"), (net[2], "weight")])
    for layer, seen in (net[0], x), (net[2], hidden):
        expected = layer.weight.abs() * seen.square().mean(0).sqrt()
        torch.testing.assert_close(scores[layer, "weight"], expected)


def test_sparsegpt_scores_square_to_the_rise_of_the_error_of_the_last_column():
    layer, x = nn.Linear(5, 3, bias=False), torch.randn(40, 5)
    net = nn.Sequential(layer)
    scores = sparsegpt_scores(net, [x], [(layer, "weight")], damping=1e-4)[layer, "weight"]
    # No column comes after the last to make up for it: its loss costs all that it gave.
    cost = layer.weight[:, -1] ** 2 * x[:, -1].square().mean()
    torch.testing.assert_close(scores[:, -1] ** 2, cost, rtol=1e-3, atol=0.0)
    # Before the first come all others: what is left is what least squares leaves.
    others = torch.linalg.lstsq(x[:, 1:], x[:, :1])
    left = (x[:, :1] - x[:, 1:] @ others.solution).square().mean()
    torch.testing.assert_close(
        scores[:, 0] ** 2, layer.weight[:, 0] ** 2 * left, rtol=1e-2, atol=0.0
    )


@pytest.mark.parametrize("score", [wanda_scores, sparsegpt_scores])
def test_scores_are_what_the_pruning_call_takes(swin, images, score):
    before = {key: value.clone() for key, value in swin.state_dict().items()}
    scores = score(swin.train(), [images])
    assert all(torch.equal(value, before[key]) for key, value in swin.state_dict().items())
    assert swin.training
    groups = group_parameters(swin)
    global_module_aware_unstructured(groups, importance_scores=scores, amount=0.5)
    global_module_aware_unstructured(groups, importance_scores=score(swin, [images]), amount=0.5)


@pytest.mark.parametrize("score", [wanda_scores, sparsegpt_scores])
def test_scores_refuse_nan(swin, score):
    with pytest.raises(ValueError, match=r"_scores\(\): batches\[0\] holds NaN"):
        score(swin, [torch.full((1, 1, 16, 16), torch.nan)])

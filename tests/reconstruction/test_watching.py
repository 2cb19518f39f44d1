"""How a model may use its layers, and what of that reconstruct() refuses."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import torch_dimap
from torch_dimap import reconstruct


class Using(nn.Module):
    """A layer, and something that a test does with it."""

    def __init__(self, use):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.use = nn.Linear(6, 6), use
        prune.random_unstructured(self.layer, "weight", amount=0.5)

    def forward(self, x):
        return self.use(self.layer, x)


@pytest.mark.parametrize(
    "use",
    [
        lambda layer, x: layer(x) * layer.weight[0],
        lambda layer, x: layer(x) + x @ layer.weight.t().contiguous(),
        lambda layer, x: layer(x) @ layer.weight,
        lambda layer, x: layer(x) + (layer.weight @ x.t()).t(),
        lambda layer, x: torch.addmm(layer.bias, x, layer.weight.t(), alpha=0.5),
    ],
    ids=["elementwise", "copied", "transposed", "first factor", "scaled"],
)
def test_reconstruct_refuses_a_weight_that_is_used_otherwise_too(use):
    model = torch_dimap.hold_masks(Using(use))
    with pytest.raises(ValueError, match="found another product with layer.weight"):
        reconstruct(model, [torch.randn(20, 6)])


@pytest.mark.parametrize(
    "use, refitted",
    [
        (lambda layer, x: x @ layer.weight.t() + layer.bias, True),
        (lambda layer, x: (x + layer.bias) @ layer.weight.t(), False),
        (lambda layer, x: layer(x) + layer.bias, False),
        (lambda layer, x: layer(x) * layer.bias, False),
    ],
    ids=["added", "added before", "added twice", "multiplied"],
)
def test_reconstruct_refits_a_bias_only_where_it_is_added_to_the_product(use, refitted):
    model = torch_dimap.hold_masks(Using(use))
    bias = model.layer.bias.detach().clone()
    assert reconstruct(model, [torch.randn(20, 6) + 1.0])["layer.weight"].after > 0
    assert torch.equal(model.layer.bias, bias) is not refitted


def test_reconstruct_refuses_rows_that_are_used_now_whole_and_now_in_parts():
    class Twice(nn.MultiheadAttention):
        def forward(self, x):
            x = super().forward(x, x, x)[0]
            return super().forward(x, x[:, :3], x[:, :3])[0]

    model = Twice(8, 2, batch_first=True)
    prune.l1_unstructured(model, "in_proj_weight", amount=0.5)
    with pytest.raises(ValueError, match="in the same rows each time.*in_proj_weight"):
        reconstruct(model, [torch.randn(4, 7, 8)])


def test_reconstruct_refuses_tied_weights_and_leaves_shared_biases():
    model, x = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6)), torch.randn(20, 6)
    model[2].bias = model[0].bias
    prune.l1_unstructured(model[0], "weight", amount=0.5)
    bias = model[0].bias.detach().clone()
    assert reconstruct(model, [x])["0.weight"].after > 0
    assert torch.equal(model[0].bias, bias)
    model[2].weight = model[0].weight_orig
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="found 0.weight tied to others.*untie them"):
        reconstruct(model, [x])
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.filterwarnings("ignore")
def test_reconstruct_refuses_a_wrapped_model_with_the_remedy():
    model = nn.DataParallel(Using(nn.Module.__call__))
    with pytest.raises(ValueError, match="found DataParallel: give model.module"):
        reconstruct(model, [torch.randn(20, 6)])

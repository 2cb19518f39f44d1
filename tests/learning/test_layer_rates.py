"""Rates that are learned under a held cost: the budget is met, and the gates become masks."""

from __future__ import annotations

import copy
import math

import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import make_swin, make_vit

import torch_dimap
from torch_dimap.learning import HeldCost, LayerRates

pytestmark = pytest.mark.usefixtures("one_thread")
MODELS = pytest.mark.parametrize("make", [make_vit, make_swin])
IMAGE = torch.zeros(1, 1, 16, 16)


def scores_of(units, seed=3):
    generator = torch.Generator().manual_seed(seed)
    layers = [layer for members in units.values() for layer in members]
    return {layer: torch.rand(layer.units, generator=generator) for layer in layers}


def make_rates(model, target=0.6, scores=None, **more):
    units = torch_dimap.group_units(model)
    held = HeldCost(target, **{"eta": 0.2, "window": 20, **more.pop("held", {})})
    return LayerRates(model, units, scores or scores_of(units), IMAGE, held, **more)


def train(model, rates, steps, lr=1e-3):
    """Learn a few images by heart; return how many steps were taken."""
    torch.manual_seed(1)
    images, labels = torch.randn(4, 1, 16, 16), torch.arange(4)
    optimizer = torch.optim.AdamW(
        [{"params": list(model.parameters()), "lr": lr},
         {"params": list(rates.parameters()), "lr": 0.1, "weight_decay": 0.0}]
    )  # fmt: skip
    for step in range(steps):
        optimizer.zero_grad()
        (F.cross_entropy(model(images), labels) + rates.penalty()).backward()
        optimizer.step()
        rates.update()
        if rates.stand_still():
            return step + 1
    return steps


@MODELS
def test_the_budget_is_met_and_what_is_reported_is_what_is_left(make):
    model = make()
    whole = torch_dimap.count_flops(model, IMAGE).dense
    rates = make_rates(model)
    taken = train(model, rates, 600)
    assert taken < 600, "they stand still before"
    assert abs(rates.soft - 0.6) <= 0.02
    hard = rates.hard
    done = rates.harden()
    assert done.share == hard
    slim = torch_dimap.remove_units(model)
    assert torch_dimap.count_flops(slim, IMAGE).dense / whole == pytest.approx(hard, abs=1e-9)
    left = {(x.name, x.kind): x.units for xs in torch_dimap.group_units(slim).values() for x in xs}
    assert left == done.kept


def test_a_multiplier_that_descends_misses_the_budget():
    """Trap (a) of the method: both weights by descent, and nothing is removed any more."""
    model = make_vit()
    rates = make_rates(model, initial=0.4)
    held = rates.held
    beta = torch.tensor(20.0, requires_grad=True)
    gamma = torch.tensor(0.0, requires_grad=True)
    optimizer = torch.optim.Adam([*rates.parameters(), beta, gamma], lr=0.3)
    for _ in range(300):
        optimizer.zero_grad()
        missing = held.target - rates.soft_share()
        (beta * missing**2 + gamma * missing).backward()
        optimizer.step()
    assert beta < 0 and gamma > 0, "in the sense of this package, both lower the loss"
    assert rates.soft > 0.95 and rates.hard > 0.97, "all is kept, though 0.6 was wanted"


def test_scores_that_cluster_move_the_rates_as_their_ranks_do(images):
    """Trap (b): a gate on raw scores that lie close together saturates, and no rate moves."""
    model = make_vit().eval()
    units = torch_dimap.group_units(model)
    spread = scores_of(units)
    clustered = {layer: 1 + values / 1000 for layer, values in spread.items()}
    gradients = []
    for scores in (spread, clustered):
        with make_rates(model, scores=scores) as rates:
            F.cross_entropy(model(images), torch.tensor([0, 1, 2, 3])).backward()
        gradients.append(rates.logits.grad)
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-4)  # some scores tie, so clustered
    assert gradients[0].abs().max() > 1e-3
    rate = torch.tensor(0.05, requires_grad=True)
    ((next(iter(clustered.values())) - rate) / 0.05).sigmoid().sum().backward()
    assert rate.grad.abs() < 1e-6


@MODELS
def test_gates_become_the_same_masks(make, images):
    model = make().eval()
    rates = make_rates(model)
    with torch.no_grad():
        rates.logits.copy_(torch.linspace(-1.5, 1.0, len(rates.logits)))
        gated = model(images)
    rates.harden()
    for other in (
        model(images),
        torch_dimap.remove_all(_copied(model))(images),
        torch_dimap.remove_units(_copied(model))(images),
    ):
        torch.testing.assert_close(other, gated, rtol=0, atol=2e-6)
    assert all(not m._forward_pre_hooks or _pruned(m) for m in model.modules())


def _pruned(module):
    return any(name.endswith("_mask") for name in module._buffers)


def _copied(model):
    with torch.no_grad():
        model(IMAGE)  # what a forward with gradients leaves cannot be copied
    return copy.deepcopy(model)


def test_soft_and_hard_shares_are_what_they_are_called(swin):
    """Against a sum over layers and units, one after the other."""
    rates = make_rates(swin, temperature=0.1)
    with torch.no_grad():
        rates.logits.copy_(torch.linspace(-2.0, 2.0, len(rates.logits)))
    whole, soft, hard = rates.costs.whole, rates.costs.whole, rates.costs.whole
    scores = scores_of(torch_dimap.group_units(swin))
    for i, (layer, cost) in enumerate(zip(rates.costs.layers, rates.costs.each)):
        rate = rates.logits[i].sigmoid().item()
        own = list(scores.values())[i].tolist()
        ranks = [sum(other < value for other in own) for value in own]
        shut = [1 / (1 + math.exp(((rank + 0.5) / layer.units - rate) / 0.1)) for rank in ranks]
        soft -= cost * sum(x for x, rank in zip(shut, ranks) if rank < layer.units - 1)
        gone = sum((rank + 0.5) / layer.units <= rate for rank in ranks)
        hard -= min(gone, layer.units - 1) * cost
        assert rates.rates()[layer.name, layer.kind] == (
            pytest.approx(rate), pytest.approx(min(gone, layer.units - 1) / layer.units)
        )  # fmt: skip
    assert rates.soft == pytest.approx(soft / whole, rel=1e-6)
    assert rates.hard == pytest.approx(hard / whole, rel=1e-12)


def test_what_must_stay_is_not_counted_as_gone():
    """Layers of one head keep it, whatever their rate is."""
    model = timm.create_model("vit_tiny_patch16_224", img_size=16, patch_size=4, in_chans=1,
                              num_classes=10, embed_dim=32, depth=2, num_heads=1)  # fmt: skip
    rates = make_rates(model, target=0.8)
    with torch.no_grad():
        rates.logits.fill_(20.0)
    assert rates.hard <= rates.soft < rates.hard + 0.03
    rates.soft_share().backward()
    assert torch.equal(rates.logits.grad[:2], torch.zeros(2))  # the heads
    assert rates.harden().kept["blocks.0.attn", "heads"] == 1


@MODELS
def test_every_layer_keeps_its_minimum(make):
    model = make()
    rates = make_rates(model, minimum=2)
    with torch.no_grad():
        rates.logits.fill_(20.0)
    assert set(rates.harden().kept.values()) == {2}


def test_the_highest_scores_stay(swin):
    units = torch_dimap.group_units(swin)
    scores = scores_of(units)
    rates = make_rates(swin, scores={layer.name: values for layer, values in scores.items()})
    with torch.no_grad():
        rates.logits.fill_(0.0)
    rates.harden()
    for layer, values in scores.items():
        keep = layer.unmasked()
        assert keep.sum() == layer.units - layer.units // 2
        assert values[keep].min() > values[~keep].max()


def test_gates_take_no_label_and_pass_gradients_to_rates_and_weights(swin, images):
    rates = make_rates(swin)
    F.cross_entropy(swin(images), torch.tensor([0, 1, 2, 3])).backward()
    assert rates.logits.grad.abs().min() > 0
    assert all(p.grad is not None for p in swin.parameters())


def test_state_goes_on_to_the_same_bytes():
    whole, stopped = make_vit(), make_vit()
    rates, first = make_rates(whole), make_rates(stopped)
    train(whole, rates, 4)
    train(stopped, first, 4)
    fresh = make_vit()
    second = make_rates(fresh, scores=scores_of(torch_dimap.group_units(fresh), seed=9))
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    fresh.load_state_dict(stopped.state_dict())
    train(whole, rates, 3)
    train(fresh, second, 3)
    torch.testing.assert_close(second.state_dict(), rates.state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(fresh.state_dict(), whole.state_dict(), rtol=0, atol=0)


def test_stand_still_waits_for_the_hard_share(swin):
    rates = make_rates(swin, held={"window": 3, "tolerance": 0.01})
    rates.held.shares.extend([0.6, 0.6, 0.6])
    rates._hard.extend([0.5, 0.9, 0.6])
    assert rates.held.stands_still() and not rates.stand_still()
    rates._hard.extend([0.6, 0.605, 0.6])
    assert rates.stand_still()


def test_remove_leaves_no_trace(swin, images):
    swin.eval()
    before = swin(images)
    with pytest.raises(ZeroDivisionError):
        with make_rates(swin, initial=0.5):
            assert not torch.equal(swin(images), before)
            raise ZeroDivisionError
    assert torch.equal(swin(images), before)
    assert not any(module._forward_pre_hooks for module in swin.modules())


def test_harden_after_remove_says_so(swin):
    rates = make_rates(swin)
    rates.remove()
    with pytest.raises(RuntimeError, match="the gates are removed"):
        rates.harden()


def test_rates_that_have_diverged_mask_nothing(swin):
    rates = make_rates(swin)
    rates.logits.data[0] = float("nan")
    with pytest.raises(ValueError, match="LayerRates: .* found NaN: the training has diverged"):
        rates.harden()
    assert not any(name.endswith("_mask") for name in swin.state_dict())


def test_layer_rates_refuses(swin):
    units = torch_dimap.group_units(swin)
    scores, held = scores_of(units), HeldCost(0.5)
    make = LayerRates
    with pytest.raises(TypeError, match="held must be a HeldCost, found float"):
        make(swin, units, scores, IMAGE, 0.5)
    with pytest.raises(ValueError, match="target must be at least 0.[0-9]+, the share"):
        make(swin, units, scores, IMAGE, HeldCost(0.01))
    with pytest.raises(ValueError, match="temperature must lie between 0 and 1, found 0"):
        make(swin, units, scores, IMAGE, held, temperature=0)
    with pytest.raises(ValueError, match="minimum must be an int, 1 or more, found 0"):
        make(swin, units, scores, IMAGE, held, minimum=0)
    with pytest.raises(ValueError, match="importance_scores has none for layers.0"):
        make(swin, units, {}, IMAGE, held)
    short = {layer: values[1:] for layer, values in scores.items()}
    with pytest.raises(ValueError, match=r"must have the shape \(2,\), found \(1,\)"):
        make(swin, units, short, IMAGE, held)
    unknown = {layer: values / 0 for layer, values in scores.items()}
    with pytest.raises(ValueError, match="importance_scores of layers.0.blocks.0.attn"):
        make(swin, units, unknown, IMAGE, held)
    with pytest.raises(ValueError, match="found blocks.0.attn, .* of another"):
        make(swin, torch_dimap.group_units(make_vit()), scores, IMAGE, held)
    torch_dimap.global_module_aware_structured(units["heads"], 0.5)
    with pytest.raises(ValueError, match="found masked ones in layers.*attn: call remove_units"):
        make(swin, units, scores, IMAGE, held)
    assert all(layer.reader._forward_pre_hooks == {} for layer in units["neurons"])

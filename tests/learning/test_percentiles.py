"""The simpler modes: percentiles within layers or kinds, cut where the cost is met."""

from __future__ import annotations

import pytest
import torch
from conftest import make_swin, make_vit
from hypothesis import given
from hypothesis import strategies as st

import torch_dimap
from torch_dimap.learning import prune_units_by_percentile
from torch_dimap.learning.percentiles import percentiles_within

pytestmark = pytest.mark.usefixtures("one_thread")
MODELS = pytest.mark.parametrize("make", [make_vit, make_swin])
IMAGE = torch.zeros(1, 1, 16, 16)


def prepared(make):
    model = make()
    units = torch_dimap.group_units(model)
    generator = torch.Generator().manual_seed(0)
    layers = [layer for members in units.values() for layer in members]
    return model, units, {x: torch.rand(x.units, generator=generator) for x in layers}


@MODELS
@pytest.mark.parametrize("within", ["layer", "kind"])
@pytest.mark.parametrize("target", [0.9, 0.6, 0.4])
def test_the_cost_is_met_to_less_than_a_unit(make, within, target):
    model, units, scores = prepared(make)
    before = torch_dimap.count_flops(model, IMAGE).dense
    done = prune_units_by_percentile(model, IMAGE, target, units, scores, within)
    slim = torch_dimap.remove_units(model)
    assert torch_dimap.count_flops(slim, IMAGE).dense / before == pytest.approx(done.share)
    cheapest = 2 * 16 * 16 / before  # a neuron: 16 tokens of at least 16 channels, twice
    assert target - 4 * cheapest < done.share <= target


@MODELS
def test_within_layers_all_lose_the_same_share(make):
    model, units, scores = prepared(make)
    done = prune_units_by_percentile(model, IMAGE, 0.6, units, scores, "layer")
    for kind, layers in units.items():
        lost = [1 - done.kept[layer.name, kind] / layer.units for layer in layers]
        widest = max(1 / layer.units for layer in layers)
        assert max(lost) - min(lost) <= widest + 1e-9


@MODELS
def test_within_kinds_one_threshold_cuts_through(make):
    model, units, scores = prepared(make)
    prune_units_by_percentile(model, IMAGE, 0.6, units, scores, "kind")
    neurons = units["neurons"]
    kept = torch.cat([scores[x][x.unmasked()] for x in neurons])
    gone = torch.cat([scores[x][~x.unmasked()] for x in neurons])
    assert len(gone) and gone.max() < kept.min() + 0.02  # but for those that were passed over


@given(st.lists(st.lists(st.sampled_from([0.0, 1.0, 2.0, 2.5]), min_size=1), min_size=1),
       st.booleans())  # fmt: skip
def test_percentiles_are_ranks_with_ties_in_order(lists, together):
    scores = [torch.tensor(values, dtype=torch.float32) for values in lists]
    keys = [0] * len(lists) if together else list(range(len(lists)))
    found = percentiles_within(scores, keys)
    for key in set(keys):
        own = [v for values, k in zip(lists, keys) if k == key for v in values]
        ranks = [sum(w < v for w in own) + own[:i].count(v) for i, v in enumerate(own)]
        got = torch.cat([f for f, k in zip(found, keys) if k == key]).tolist()
        assert got == pytest.approx([(rank + 0.5) / len(own) for rank in ranks])


def test_every_layer_keeps_its_minimum(swin):
    _, _, scores = prepared(make_swin)
    units = torch_dimap.group_units(swin)
    given_scores = {layer.name: values for layer, values in scores.items()}
    with pytest.raises(ValueError, match="target must be at least 0.[0-9]+, the share"):
        prune_units_by_percentile(swin, IMAGE, 0.05, units, given_scores)
    assert all(layer.unmasked().all() for members in units.values() for layer in members)
    done = prune_units_by_percentile(swin, IMAGE, 0.385, units, given_scores, minimum=2)
    assert min(done.kept.values()) == 2


def test_prune_units_by_percentile_refuses(swin):
    units = torch_dimap.group_units(swin)
    scores = {x: torch.ones(x.units) for members in units.values() for x in members}
    with pytest.raises(ValueError, match="within must be 'layer' or 'kind', found 'model'"):
        prune_units_by_percentile(swin, IMAGE, 0.5, units, scores, "model")
    for target in (0, 1.0, True, "half", float("nan")):
        with pytest.raises(ValueError, match="target must be a share of the multiply-adds"):
            prune_units_by_percentile(swin, IMAGE, target, units, scores)
    with pytest.raises(TypeError, match="importance_scores must be a mapping"):
        prune_units_by_percentile(swin, IMAGE, 0.5, units, list(scores.values()))

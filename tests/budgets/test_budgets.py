"""Budgets by hand, against a search through every amount, and on Swin-T."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import prune

from torch_dimap import (
    count_flops,
    global_module_aware_unstructured,
    prune_to_flops,
    prune_to_parameters,
    summarize,
)
from torch_dimap.budgets.smallest import smallest


def costly_first() -> tuple[nn.Sequential, dict[str, list]]:
    """A layer of 6 weights that runs on 10 pixels, and one of 8 that runs on one."""
    model = nn.Sequential(nn.Conv2d(3, 2, 1, bias=False), nn.Flatten(), nn.Linear(20, 8))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([6.0, 5, 4, 3, 2, 1]).view(2, 3, 1, 1))
        model[2].weight.copy_(torch.arange(160.0, 0, -1).view(8, 20))
    return model, {"conv": [(model[0], "weight")], "fc": [(model[2], "weight")]}


PIXELS = torch.zeros(1, 3, 2, 5)  # 60 FLOPs in the convolution, 160 behind it


def test_prune_to_flops_meets_an_absolute_target_by_hand():
    model, groups = costly_first()
    # 220 in all. Pruning a fraction a saves 10 * round(6 a) + round(160 a): at a = 66/160
    # that is 20 + 66 = 86; at 67/160, where 6 a = 2.51 rounds up, 30 + 67 = 97.
    budget = prune_to_flops(model, PIXELS, 130, groups)
    assert budget.amount == {"conv": 67 / 160, "fc": 67 / 160}
    assert (budget.target, budget.reached) == (130, 123)
    assert count_flops(model, PIXELS, groups).masked == 123
    assert int(model[0].weight_mask.sum()) == 3 and int(model[2].weight_mask.sum()) == 93


def test_prune_to_flops_takes_a_fraction_of_the_dense_flops():
    model, groups = costly_first()
    budget = prune_to_flops(model, PIXELS, 0.75, groups)
    assert budget.target == 165 and budget.reached <= 165
    assert budget.reached == count_flops(model, PIXELS, groups).masked


def test_prune_to_flops_returns_the_thresholds_of_the_pruning():
    model, groups = costly_first()
    other, same = costly_first()
    budget = prune_to_flops(model, PIXELS, 130, groups)
    assert budget.thresholds == global_module_aware_unstructured(same, amount=budget.amount)
    assert torch.equal(model[2].weight_mask, other[2].weight_mask)


def test_prune_to_flops_holds_fixed_groups():
    model, groups = costly_first()
    budget = prune_to_flops(model, PIXELS, 100, groups, fixed={"conv": 3})
    # 30 are saved by the convolution, 90 remain for the other: one each.
    assert budget.amount == {"conv": 3, "fc": 90 / 160}
    assert budget.reached == 100


def test_prune_to_flops_leaves_alone_what_fits():
    model, groups = costly_first()
    budget = prune_to_flops(model, PIXELS, 1.0, groups)
    assert budget.amount == {"conv": 0.0, "fc": 0.0} and budget.reached == 220
    assert model[0].weight_mask.all()


def test_prune_to_flops_goes_on_from_an_earlier_pruning():
    model, groups = costly_first()
    prune_to_flops(model, PIXELS, 150, groups)
    earlier = model[2].weight_mask.clone()
    budget = prune_to_flops(model, PIXELS, 0.5, groups)
    assert budget.target == 110 and 100 <= budget.reached <= 110
    assert budget.reached == count_flops(model, PIXELS, groups).masked
    assert not (model[2].weight_mask & ~earlier).any()


def test_prune_to_flops_counts_zeros_that_are_there_as_saved():
    model, groups = costly_first()
    with torch.no_grad():
        model[2].weight[:4] = 0
    budget = prune_to_flops(model, PIXELS, 130, groups)
    assert budget.reached == count_flops(model, PIXELS, groups).masked <= 130


def test_prune_to_flops_ranks_by_other_scores():
    model, groups = costly_first()
    scores = {(model[2], "weight"): torch.arange(1.0, 161).view(8, 20)}
    prune_to_flops(model, PIXELS, 140, {"fc": groups["fc"]}, importance_scores=scores)
    assert model[2].weight_mask.flatten().tolist() == [False] * 80 + [True] * 80


def test_prune_to_parameters_counts_all_parameters():
    model, groups = costly_first()
    budget = prune_to_parameters(model, 100, groups)
    whole = summarize(model, parameters=groups).model
    assert whole.weights == 6 + 160 + 8
    assert budget.reached == whole.weights - whole.zeros
    assert 99 <= budget.reached <= 100


def test_prune_to_parameters_gives_the_paper_s_swin_tiny_at_55_per_cent():
    model = timm.create_model("swin_tiny_patch4_window7_224")
    budget = prune_to_parameters(model, 14_055_163)
    assert set(budget.amount) == {"qkv", "proj", "mlp"}
    assert max(budget.amount.values()) == pytest.approx(0.55, abs=1e-7)
    assert budget.reached == 14_055_163


@pytest.mark.parametrize("first", [1, 2, 500_000, 999_999, 1_000_000])
@pytest.mark.parametrize("low, high", [(0, 11), (10, 11), (10, 10**12), (0, 10**12)])
def test_smallest_finds_a_single_step_without_trying_all(first, low, high):
    tried = []

    def function(step: int) -> int:
        tried.append(step)
        return low if step >= first else high

    assert smallest(function, 10, 1_000_000) == (first, low)
    assert len(tried) < 70


@pytest.mark.parametrize("fraction", [0.3, 0.5, 0.7])
def test_prune_to_flops_of_swin_tiny_is_exact_to_a_weight_per_group(fraction):
    model, image = timm.create_model("swin_tiny_patch4_window7_224"), torch.zeros(1, 3, 224, 224)
    budget = prune_to_flops(model, image, fraction)
    count = count_flops(model, image)
    assert budget.target == int(fraction * 4_509_194_496)
    assert count.masked == budget.reached <= budget.target
    # No weight runs on more than the 56 x 56 pixels of the first stage; three groups.
    assert budget.target - budget.reached < 3 * 56 * 56


@pytest.mark.filterwarnings("ignore:.*no weight is left:UserWarning")
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31), target=st.integers(0, 1000))
def test_prune_to_flops_finds_what_a_search_through_every_amount_finds(seed, target):
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(2, 3, 1, bias=False), nn.Flatten(), nn.Linear(12, 4), nn.Linear(4, 2)
    )
    for parameter in model.parameters():  # few values: many ties, some zeros
        parameter.data = torch.randint(-3, 4, parameter.shape, generator=generator).float()
    groups = {
        "conv": [(model[0], "weight")],
        "fc": [(model[2], "weight"), (model[3], "weight")],
    }
    x = torch.zeros(2, 2, 2, 2)
    whole = count_flops(model, x, groups).dense
    target = min(target, whole)
    steps = 56

    def masked(step: int) -> int:
        trial = copy.deepcopy(model)
        pairs = {
            "conv": [(trial[0], "weight")],
            "fc": [(trial[2], "weight"), (trial[3], "weight")],
        }
        global_module_aware_unstructured(pairs, amount=step / steps)
        kept = [int((trial[i].weight != 0).sum()) for i in (0, 2, 3)]
        return 2 * (4 * kept[0] + kept[1] + kept[2])  # a batch of two, four pixels

    values = [masked(step) for step in range(steps + 1)]
    assert values == sorted(values, reverse=True) and values[-1] == 0
    expected = next(step for step, value in enumerate(values) if value <= target)
    budget = prune_to_flops(model, x, target, groups)
    assert (budget.amount["fc"], budget.reached) == (expected / steps, values[expected])


def test_prune_to_flops_names_the_lowest_that_can_be_reached():
    model, groups = costly_first()
    with pytest.raises(ValueError, match="at least the 160 FLOPs left when every.*found 159"):
        prune_to_flops(model, PIXELS, 159, {"conv": groups["conv"]})
    with pytest.raises(ValueError, match="at least the 30 FLOPs .* not fixed is pruned.*found 29"):
        prune_to_flops(model, PIXELS, 29, groups, fixed={"conv": 0.5})
    with pytest.raises(ValueError, match="at least the 8 parameters left.*found 6"):
        prune_to_parameters(model, 0.04, groups)
    assert not prune.is_pruned(model)


@pytest.mark.filterwarnings("ignore:.*no weight is left:UserWarning")
def test_prune_to_flops_reaches_the_lowest():
    model, groups = costly_first()
    budget = prune_to_flops(model, PIXELS, 30, groups, fixed={"conv": 0.5})
    assert budget.reached == 30 and budget.amount["fc"] == 1.0


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"target": 1.5}, ValueError, r"lie in \[0, 1\], found 1.5: a number of FLOPs is"),
        ({"target": float("nan")}, ValueError, "found nan"),
        ({"target": True}, TypeError, "an int .a number of FLOPs. or a float.*found bool"),
        ({"target": "half"}, TypeError, "found str"),
        ({"fixed": {"qkv": 0.1}}, ValueError, r"some of the groups \['conv', 'fc'\].*\['qkv'\]"),
        ({"fixed": {"conv": 0.1, "fc": 0.1}}, ValueError, "leave at least one free"),
        ({"fixed": {"conv": 1.1}}, ValueError, r"fixed\['conv'\] as a float must lie in"),
        ({"fixed": {"conv": 7}}, ValueError, r"fixed\['conv'\] asks to prune 7, but"),
        ({"fixed": 0.1}, TypeError, "fixed must be a mapping group -> amount, found float"),
        ({"importance_scores": {}}, ValueError, "importance_scores has none for"),
    ],
)
def test_prune_to_flops_refuses_before_anything_changes(arguments, error, message):
    model, groups = costly_first()
    with pytest.raises(error, match=message):
        prune_to_flops(model, PIXELS, **{"target": 0.5, "parameters": groups, **arguments})
    assert not prune.is_pruned(model)

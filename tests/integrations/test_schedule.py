"""The schedule: exact counts, in rounds, the same after a resume."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import make_swin
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import prune

from torch_dimap import (
    PruningSchedule,
    global_module_aware_unstructured,
    group_parameters,
    group_units,
)


def net(sizes=(30, 50, 70)) -> nn.ModuleList:
    torch.manual_seed(0)
    return nn.ModuleList(nn.Linear(size, 10) for size in sizes)


def grouped(model: nn.ModuleList) -> dict[str, list]:
    return {str(i): [(layer, "weight")] for i, layer in enumerate(model)}


def gone(model: nn.Module) -> dict[str, int]:
    return {
        str(i): int((~layer.weight_mask).sum()) for i, layer in enumerate(model.children())
    }


def test_step_prunes_when_it_is_due_and_counts_exactly():
    model = net()
    amount = {"0": 0.5, "1": 100, "2": 0.0}
    schedule = PruningSchedule(grouped(model), amount, begin=2, end=10, every=4)
    assert list(schedule.steps) == [2, 6, 10] and schedule.density == 1.0
    found = {}
    for step in range(15):
        thresholds = schedule.step(step)
        if thresholds:
            assert thresholds.keys() == amount.keys() and thresholds["2"] == 0.0
            found[step] = gone(model)
    shares = [1 - (2 / 3) ** 3, 1 - (1 / 3) ** 3, 1.0]
    assert found == {
        step: {"0": round(150 * share), "1": round(100 * share), "2": 0}
        for step, share in zip((2, 6, 10), shares)
    }
    assert schedule.density == 1 - 250 / 1500


@pytest.mark.parametrize(
    "curve, shares", [("linear", [0.25, 0.5, 0.75, 1.0]), ("one-shot", [1.0, 1.0, 1.0, 1.0])]
)
def test_curves(curve, shares):
    model = net()
    schedule = PruningSchedule(grouped(model), 0.8, end=3, curve=curve)
    for step, share in enumerate(shares):
        schedule.step(step)
        assert sum(gone(model).values()) == round(share * 1200)


def test_one_round_is_the_pruning_call():
    model, reference = make_swin(), make_swin()
    thresholds = PruningSchedule(group_parameters(model), 0.55).step(0)
    assert thresholds == global_module_aware_unstructured(group_parameters(reference), amount=0.55)
    torch.testing.assert_close(model.state_dict(), reference.state_dict(), rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:.*no weight is left")
@given(
    st.integers(0, 5), st.integers(0, 30), st.integers(1, 9), st.floats(0, 1),
    st.sampled_from(["cubic", "linear", "one-shot"]), st.lists(st.integers(0, 40), max_size=8),
)  # fmt: skip
def test_counts_do_not_depend_on_which_steps_are_told(begin, length, every, amount, curve, told):
    """Between rounds nothing happens, missed rounds are made up for, and the end is exact."""
    model = net((7, 4))
    schedule = PruningSchedule(grouped(model), amount, begin=begin, end=begin + length,
                               every=every, curve=curve)  # fmt: skip
    for n in sorted(told):
        schedule.step(n)
        rounds = sum(step <= n for step in schedule.steps)
        assert gone(model) == schedule.gone_after(rounds)
    schedule.step(begin + length)
    assert gone(model) == schedule.goals == {"0": round(70 * amount), "1": round(40 * amount)}


def test_masks_only_shrink_and_what_went_before_counts():
    model = net()
    global_module_aware_unstructured(grouped(model), amount=0.4)
    before = {i: layer.weight_mask.clone() for i, layer in enumerate(model)}
    schedule = PruningSchedule(grouped(model), 0.5, end=2)
    assert schedule.density == pytest.approx(0.6)
    schedule.step(0)  # 35 % after this round: less than is gone already
    assert all(torch.equal(layer.weight_mask, before[i]) for i, layer in enumerate(model))
    schedule.step(2)
    assert schedule.density == 0.5
    assert all(not (layer.weight_mask & ~before[i]).any() for i, layer in enumerate(model))


def test_units_go_in_rounds():
    model = make_swin()
    schedule = PruningSchedule(group_units(model), {"heads": 0.5, "neurons": 0.5}, end=1)
    assert schedule.goals == {"heads": 6, "neurons": 192}
    alive = []
    for step in range(2):
        assert schedule.step(step).keys() == {"heads", "neurons"}
        units = group_units(model)
        alive.append({k: sum(int(x.unmasked().sum()) for x in own) for k, own in units.items()})
    assert alive == [{"heads": 7, "neurons": 224}, {"heads": 6, "neurons": 192}]  # 7/8 of a half


@pytest.mark.parametrize("grouping", [group_parameters, group_units])
def test_a_loop_that_stops_and_resumes_ends_in_the_same_weights(grouping, images, one_thread):
    labels = torch.tensor([0, 1, 2, 3])

    def start():
        model = make_swin().eval()
        schedule = PruningSchedule(grouping(model), 0.6, begin=1, end=7, every=3)
        return model, schedule, torch.optim.AdamW(model.parameters(), lr=1e-3)

    def train(model, schedule, optimizer, steps):
        for step in steps:
            schedule.step(step)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()

    whole = start()
    train(*whole, range(10))
    first = start()
    train(*first, range(5))  # between two rounds
    saved = copy.deepcopy([part.state_dict() for part in first])
    second = start()
    for part, state in zip(second, saved):
        part.load_state_dict(state)
    train(*second, range(5, 10))
    assert second[1].rounds_done == 3 and second[1].density == whole[1].density
    torch.testing.assert_close(second[0].state_dict(), whole[0].state_dict(), rtol=0, atol=0)


def test_a_state_is_plain_and_of_the_same_settings_only(tmp_path):
    schedule = PruningSchedule(grouped(net()), 0.5, end=4, every=2)
    schedule.step(2)
    torch.save(schedule.state_dict(), tmp_path / "state.pth")
    state = torch.load(tmp_path / "state.pth", weights_only=True)
    same = PruningSchedule(grouped(net()), 0.5, end=5, every=2)
    same.load_state_dict(state)
    assert same.rounds_done == 2
    for other, name in [({"end": 6}, "steps"), ({"curve": "linear"}, "curve")]:
        schedule = PruningSchedule(grouped(net()), 0.5, **{"end": 4, "every": 2, **other})
        with pytest.raises(ValueError, match=f"load_state_dict.*: {name} must be what it was"):
            schedule.load_state_dict(state)
        assert schedule.rounds_done == 0
    with pytest.raises(ValueError, match="goals must be what it was .*'0': 150"):
        PruningSchedule(grouped(net()), 0.6, end=4, every=2).load_state_dict(state)


def test_a_resumed_schedule_wants_a_model_with_masks():
    first = net()
    schedule = PruningSchedule(grouped(first), 0.5)
    schedule.step(0)
    state, weights = schedule.state_dict(), first.state_dict()
    second = net()
    resumed = PruningSchedule(grouped(second), 0.5)
    resumed.load_state_dict(state)  # all rounds are done: nothing would ever be pruned
    for _ in range(2):
        with pytest.raises(RuntimeError, match="masks of .* before, 1, found none: load the model"):
            resumed.step(1)
    second.load_state_dict(weights)
    assert resumed.step(1) is None and resumed.density == 0.5


@pytest.mark.parametrize("masked", [False, True])
def test_units_that_cannot_go_are_refused_at_once(masked):
    model = make_swin()
    if masked:
        PruningSchedule(group_units(model), {"heads": 0.5, "neurons": 0.5}).step(0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    units = group_units(model)
    heads, layers = sum(layer.units for layer in units["heads"]), len(units["heads"])
    most = heads - layers
    with pytest.raises(ValueError, match=rf"of 'heads' at most {most} of {heads} .* {most + 1}:"):
        PruningSchedule(units, {"heads": most + 1, "neurons": 0.5}, end=9)
    assert before.keys() == model.state_dict().keys()
    schedule = PruningSchedule(units, {"heads": most, "neurons": 0.5}, end=9)
    for step in range(10):
        schedule.step(step)
    assert sum(int(layer.unmasked().sum()) for layer in units["heads"]) == layers


def test_other_rankings_serve_too():
    model, reference = net(), net()
    PruningSchedule(grouped(model), 0.5, pruning_method=prune.L1Unstructured).step(0)
    for layer in reference:
        prune.l1_unstructured(layer, "weight", amount=0.5)
    assert all(torch.equal(a.weight_mask, b.weight_mask.bool()) for a, b in zip(model, reference))


def test_wrong_arguments_are_refused_before_a_mask_is_put_on():
    model = net()
    for options, error, message in [
        ({"begin": -1}, ValueError, "begin must be 0 or more, found -1"),
        ({"begin": 5, "end": 4}, ValueError, "end must be 5 or more, found 4"),
        ({"every": 0}, ValueError, "every must be 1 or more"),
        ({"every": 1.5}, TypeError, "every must be an int, found float"),
        ({"curve": "sine"}, ValueError, "must be among cubic, linear, one-shot, found 'sine'"),
        ({"amount": 1.5}, ValueError, r"PruningSchedule\(\): amount as a float must lie in"),
        ({"amount": {"0": 0.5}}, ValueError, r"must name the groups \['0', '1', '2'\]"),
        ({"parameters": model}, TypeError, "must be a .module, name. pair"),
    ]:
        with pytest.raises(error, match=message):
            PruningSchedule(**{"parameters": grouped(model), "amount": 0.5, **options})
    assert not any(hasattr(layer, "weight_mask") for layer in model)

"""Budgets of whole units: counted after removal, and measured with a clock of our own."""

from __future__ import annotations

import copy
import datetime
import itertools
import time

import backbones
import pytest
import timm
import torch
from torch import nn
from torch.nn.utils import prune

from torch_dimap import (
    count_flops,
    global_module_aware_structured,
    global_module_aware_unstructured,
    group_parameters,
    group_units,
    prune_units_to_flops,
    prune_units_to_latency,
    remove_units,
)
from torch_dimap.accounting import count_unit_flops, unit_flops
from torch_dimap.accounting.unit_flops import slim_copy
from torch_dimap.budgets import timing


def make_vit() -> nn.Module:
    torch.manual_seed(0)
    return timm.models.vision_transformer.VisionTransformer(
        img_size=16, patch_size=4, in_chans=1, num_classes=10, embed_dim=32, depth=3, num_heads=4,
        qk_norm=True,
    )  # fmt: skip


@pytest.fixture
def vit() -> nn.Module:
    return make_vit()


def counted(model: nn.Module, images: torch.Tensor) -> int:
    """Count what is left of a model once its dead units are cut out of a copy."""
    slim = remove_units(copy.deepcopy(model))
    return count_flops(slim, images).dense


def all_layers(model):
    return [layer for layers in group_units(model).values() for layer in layers]


@pytest.mark.parametrize("name", ["swin", "vit"])
@pytest.mark.parametrize("target", [0.9, 0.6, 0.45])
def test_prune_units_to_flops_reaches_what_is_counted_after_removal(name, target, images, request):
    model = request.getfixturevalue(name)
    whole = count_flops(model, images).dense
    budget = prune_units_to_flops(model, images, target, multiple=1)
    assert budget.target == int(target * whole)
    assert counted(model, images) == budget.reached <= budget.target


@pytest.mark.parametrize("family", ["swinv2", "beit", "mvitv2", "coatnet", "pvt_v2"])
def test_prune_units_to_flops_counts_layers_that_lose_all_heads(family):
    model, x = backbones.build(family), backbones.images(family)
    least = copy.deepcopy(model)
    global_module_aware_structured(group_units(least)["heads"], 1.0, minimum=0)
    heads = group_units(model)["heads"]
    budget = prune_units_to_flops(model, x, counted(least, x), heads, minimum=0)
    assert counted(model, x) == budget.reached == budget.target


def test_prune_units_to_flops_takes_the_smallest_amount(swin, images):
    other = copy.deepcopy(swin)
    budget = prune_units_to_flops(swin, images, 0.7, multiple=1)
    neurons = sum(layer.units for layer in group_units(swin)["neurons"])
    step = round(budget.amount["neurons"] * neurons)
    assert budget.amount["neurons"] == step / neurons
    global_module_aware_structured(group_units(other), (step - 1) / neurons, multiple=1)
    assert counted(other, images) > budget.target
    kept = {x.name: int(x.unmasked().sum()) for x in group_units(swin)["neurons"]}
    assert budget.units["neurons"].kept == kept


def test_prune_units_to_flops_of_swin_tiny_is_exact():
    model, image = timm.create_model("swin_tiny_patch4_window7_224"), torch.zeros(1, 3, 224, 224)
    budget = prune_units_to_flops(model, image, 0.5)
    assert budget.target == 4_509_194_496 // 2
    assert counted(model, image) == budget.reached <= budget.target
    # Half a multiple of neurons at the most, and a head, both where they cost most.
    assert budget.target - budget.reached < 0.01 * budget.target
    assert all(kept % 16 == 0 for kept in budget.units["neurons"].kept.values())


def test_prune_units_to_flops_holds_fixed_groups(swin, images):
    budget = prune_units_to_flops(swin, images, 0.6, fixed={"heads": 0.25}, multiple=1)
    assert budget.amount["heads"] == 0.25 and budget.units["heads"].pruned == 3
    assert counted(swin, images) == budget.reached <= budget.target


def test_prune_units_to_flops_takes_an_int_and_leaves_alone_what_fits(vit, images):
    whole = count_flops(vit, images).dense
    budget = prune_units_to_flops(vit, images, whole)
    assert budget.amount == {"heads": 0.0, "neurons": 0.0} and budget.reached == whole
    assert all(layer.unmasked().all() for layer in all_layers(vit))


def test_prune_units_to_flops_goes_as_far_as_each_group_may(vit, images):
    lowest = copy.deepcopy(vit)
    units = group_units(lowest)
    global_module_aware_structured(units, {"heads": 9, "neurons": 3 * 127}, multiple=1)
    least = counted(lowest, images)
    budget = prune_units_to_flops(vit, images, least, multiple=1)
    assert budget.reached == least
    assert budget.units["heads"].pruned == 9 and budget.units["neurons"].pruned == 3 * 127
    message = f"at least the {least} multiply-adds left when all goes that minimum and multiple"
    with pytest.raises(ValueError, match=f"{message} allow, found {least - 1}"):
        prune_units_to_flops(make_vit(), images, least - 1, multiple=1)


def test_prune_units_to_flops_goes_on_from_masks_and_zeros(swin, images):
    global_module_aware_structured(group_units(swin), 0.25, multiple=1)
    with torch.no_grad():  # a dead neuron that no mask has taken
        swin.layers[1].blocks[0].mlp.fc2.weight_orig[:, 5] = 0
    global_module_aware_unstructured(group_parameters(swin), amount=0.1)
    swin(images).sum().backward()  # masked weights carry a graph now
    before = {layer.name + layer.kind: layer.unmasked() for layer in all_layers(swin)}
    budget = prune_units_to_flops(swin, images, 0.5, multiple=1)
    assert all(not (x.unmasked() & ~before[x.name + x.kind]).any() for x in all_layers(swin))
    swin(images)
    with torch.no_grad():
        swin(images)
    assert counted(swin, images) == budget.reached <= budget.target


def test_prune_units_to_flops_counts_what_a_compiled_model_wraps(vit, images):
    plain = prune_units_to_flops(copy.deepcopy(vit), images, 0.6)
    compiled = torch.compile(vit)  # which compiles nothing before it is called
    assert prune_units_to_flops(compiled, images, 0.6).reached == plain.reached
    with pytest.raises(TypeError, match="found one from torch.compile"):
        prune_units_to_latency(compiled, images, 0.6)


def test_prune_units_to_flops_ranks_by_other_scores(vit, images):
    scores = {layer: torch.arange(1.0, layer.units + 1) for layer in all_layers(vit)}
    prune_units_to_flops(vit, images, 0.7, importance_scores=scores, multiple=1)
    for layer in all_layers(vit):
        kept = layer.unmasked().tolist()
        assert kept == sorted(kept)  # the first went


def test_count_unit_flops_agrees_by_module_and_one_layer_at_a_time(swin, images, monkeypatch):
    layers = all_layers(swin)
    whole, fast = count_unit_flops(swin, images, layers)
    by_module = unit_flops.flops_by_module

    def whole_model_only(model, inputs):
        counts = by_module(model, inputs)
        return type(counts)({"": counts[""]})

    monkeypatch.setattr(unit_flops, "flops_by_module", whole_model_only)
    assert count_unit_flops(swin, images, layers) == (whole, fast)
    attention = fast[0]
    # A window of 16 tokens, 64 windows in 4 images of 8 x 8 patches make 16: 8 channels a head.
    tokens, dim, head = 4 * 64, 16, 8
    assert attention.multiply_adds == tokens * (4 * dim * head + 2 * 16 * head)
    assert fast[4].multiply_adds == 2 * tokens * dim


def test_slim_copy_gives_what_removal_would_and_leaves_the_model(swin, images):
    global_module_aware_structured(group_units(swin), 0.5)
    swin.eval()
    swin(images).sum().backward()
    state = {key: value.clone() for key, value in swin.state_dict().items()}
    keeps = {layer: layer.alive() for layer in all_layers(swin)}
    slim = slim_copy(swin, keeps)
    torch.testing.assert_close(slim(images), swin(images), rtol=1e-5, atol=1e-6)
    assert not prune.is_pruned(slim) and prune.is_pruned(swin)
    assert sum(p.numel() for p in slim.parameters()) < sum(p.numel() for p in swin.parameters())
    torch.testing.assert_close(dict(swin.state_dict()), state, rtol=0, atol=0)


class Clock:
    """Forwards that take a nanosecond for each parameter, and now and then a little more."""

    def __init__(self, noise=(1.0,)):
        self.noise = itertools.cycle(noise)
        self.devices = set()

    def __call__(self, model, inputs, device):
        assert model.training is False and all(x.device == device for x in inputs)
        self.devices.add(str(device))
        return 1e-9 * parameters(model) * next(self.noise)


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.fixture
def clock(monkeypatch):
    def start(*noise):
        found = Clock(noise or (1.0,))
        monkeypatch.setattr(timing, "forward_seconds", found)
        return found

    return start


def test_prune_units_to_latency_takes_the_smallest_amount_and_measures_it_again(
    swin, images, clock
):
    clock()
    dense, other = 1e-9 * parameters(swin), copy.deepcopy(swin)
    budget = prune_units_to_latency(swin, images, 0.7, multiple=1)
    slim = 1e-9 * parameters(remove_units(swin))
    assert (budget.dense, budget.target) == pytest.approx((dense, 0.7 * dense))
    assert (budget.predicted, budget.reached) == pytest.approx((slim, slim), rel=1e-4)
    assert budget.reached <= budget.target
    step = round(64 * budget.amount["neurons"])
    assert budget.amount == {"heads": step / 64, "neurons": step / 64}
    global_module_aware_structured(group_units(other), (step - 1) / 64, multiple=1)
    assert 1e-9 * parameters(remove_units(other)) > budget.target


def test_prune_units_to_latency_takes_a_time_and_a_device_and_fixed_groups(swin, images, clock):
    found = clock()
    target = datetime.timedelta(microseconds=round(800e-6 * parameters(swin)))
    budget = prune_units_to_latency(swin, (images,), target, "cpu", fixed={"heads": 0.0},
                                    multiple=1)  # fmt: skip
    assert found.devices == {"cpu"} and budget.target == target.total_seconds()
    assert budget.units["heads"].pruned == 0 and budget.reached <= budget.target
    assert 1e-9 * parameters(remove_units(swin)) <= target.total_seconds()


def test_prune_units_to_latency_is_not_misled_by_a_passing_load(swin, images, clock):
    clock()
    calm = prune_units_to_latency(copy.deepcopy(swin), images, 0.6, multiple=1)
    clock(1, 1, 1, 1, 1, 1, 1, 1, 9, 1, 1, 1, 1, 1, 1)
    assert prune_units_to_latency(swin, images, 0.6, multiple=1).amount == calm.amount


def test_prune_units_to_latency_goes_on_if_the_second_measurement_is_slower(
    swin, images, monkeypatch
):
    seen: dict[int, int] = {}

    def compare(model, reference, inputs, device):
        size = parameters(model)
        seen[size] = seen.get(size, 0) + 1
        slower = 1.05 if seen[size] > 1 else 1.0  # than when the search measured it
        return slower * size / parameters(reference), 1.0

    monkeypatch.setattr("torch_dimap.budgets.latency.compare_times", compare)
    dense = parameters(swin)
    budget = prune_units_to_latency(swin, images, 0.7, multiple=1)
    assert budget.predicted < budget.reached <= budget.target == 0.7
    assert budget.reached == pytest.approx(1.05 * parameters(remove_units(swin)) / dense, rel=1e-5)


def test_prune_units_to_latency_names_the_shortest_time(swin, images, clock):
    clock()
    with pytest.raises(ValueError, match=r"at least the [\d.e-]+ s \(0\.\d+ of the dense model's"):
        prune_units_to_latency(swin, images, 0.1)
    with pytest.raises(ValueError, match="minimum and multiple allow, found 1e-06 s: raise it"):
        prune_units_to_latency(swin, images, datetime.timedelta(microseconds=1))
    assert not prune.is_pruned(swin)


def test_prune_units_to_latency_leaves_alone_what_is_fast_enough(swin, images, clock):
    clock()
    budget = prune_units_to_latency(swin, images, 1.0)
    assert budget.amount == {"heads": 0.0, "neurons": 0.0}
    assert budget.predicted == budget.reached == budget.dense


class Sleep(nn.Module):
    """A forward that takes a known time, about."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        time.sleep(self.seconds)
        return x


def test_compare_times_measures_by_the_clock(images, monkeypatch):
    monkeypatch.setattr(timing, "SECONDS", 0.0)
    ratio, seconds = timing.compare_times(
        Sleep(0.001), Sleep(0.02), (images,), torch.device("cpu")
    )
    assert seconds >= 0.02 and 0 < ratio < 0.5


BOTH = [prune_units_to_flops, prune_units_to_latency]


@pytest.mark.parametrize("function", BOTH)
@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"target": 1.5}, ValueError, r"lie in \[0, 1\], found 1.5"),
        ({"target": float("nan")}, ValueError, "found nan"),
        ({"target": True}, TypeError, "found bool"),
        ({"target": "half"}, TypeError, "found str"),
        ({"inputs": [1]}, TypeError, "inputs must be a tensor or a tuple.*found list"),
        ({"fixed": {"qkv": 0.1}}, ValueError, r"some of the groups \['heads', 'neurons'\]"),
        ({"fixed": {"heads": 0.1, "neurons": 0.1}}, ValueError, "leave at least one free"),
        ({"fixed": {"heads": 0.9}}, ValueError, "of 'heads' .* units are to go, but only"),
        ({"minimum": -1}, ValueError, "minimum must be 0 or more"),
        ({"multiple": 0}, ValueError, "multiple must be 1 or more"),
        ({"units": []}, ValueError, "units"),
        ({"importance_scores": {}}, ValueError, "importance_scores has none for"),
    ],
)
def test_unit_budgets_refuse_before_anything_changes(
    function, arguments, error, message, swin, images, clock
):
    clock()
    with pytest.raises(error, match=rf"^{function.__name__}\(\): .*{message}"):
        function(swin, **{"inputs": images, "target": 0.9, **arguments})
    assert not prune.is_pruned(swin)


@pytest.mark.parametrize("function", BOTH)
def test_unit_budgets_refuse_units_of_another_model(function, swin, vit, images, clock):
    clock()
    with pytest.raises(ValueError, match="must be those of the model, found blocks.0.attn of"):
        function(swin, images, 0.9, units=group_units(vit))


def test_prune_units_to_latency_refuses_a_number_of_seconds(swin, images):
    with pytest.raises(TypeError, match="or a datetime.timedelta, found int"):
        prune_units_to_latency(swin, images, 1)

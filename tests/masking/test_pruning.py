"""Pruning in place: exact counts, torch's own mechanism, nothing half done."""

from __future__ import annotations

import copy
import inspect
import pickle

import numpy as np
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import select_exactly
from timm.utils import ModelEmaV2, ModelEmaV3
from torch import nn
from torch.nn.utils import prune
from torch.optim.swa_utils import AveragedModel

import torch_dimap
from torch_dimap import (
    DimapUnstructured,
    dimap_unstructured,
    global_module_aware_unstructured,
    group_parameters,
    prune_to_flops,
    prune_to_parameters,
    remove_all,
)


@pytest.fixture
def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 6), nn.GELU(), nn.Linear(6, 5), nn.Linear(5, 4))


def pairs_of(net: nn.Module) -> list[tuple[nn.Module, str]]:
    return [(module, "weight") for module in net.modules() if isinstance(module, nn.Linear)]


def masks_of(pairs) -> list[torch.Tensor]:
    return [getattr(module, f"{name}_mask").clone() for module, name in pairs]


def state_of(model: nn.Module) -> list:
    """Return all that pruning could touch, by identity and by value."""
    return [
        (
            {key: (id(p), p.detach().clone()) for key, p in module._parameters.items()},
            {key: (id(b), b.clone()) for key, b in module._buffers.items()},
            dict(module._forward_pre_hooks),
            id(vars(module).get("weight")),
        )
        for module in model.modules()
        if isinstance(module, nn.Linear)
    ]


def assert_same_state(before: list, after: list) -> None:
    for (p0, b0, h0, w0), (p1, b1, h1, w1) in zip(before, after, strict=True):
        assert list(p0) == list(p1) and list(b0) == list(b1) and h0 == h1 and w0 == w1
        for table0, table1 in ((p0, p1), (b0, b1)):
            for key, (identity, value) in table0.items():
                assert identity == table1[key][0] and torch.equal(value, table1[key][1])


# --- what goes -----------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*no weight is left")
@settings(max_examples=60, deadline=None)
@given(st.data())
def test_global_module_aware_unstructured_equals_the_double_loop(data):
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))
    shapes = data.draw(st.lists(st.tuples(*[st.integers(1, 6)] * 2), min_size=2, max_size=5))
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    layers = [nn.Linear(*shape, bias=False, dtype=dtype) for shape in shapes]
    for layer in layers:
        with torch.no_grad():
            layer.weight.mul_(data.draw(st.sampled_from([1e-3, 1.0, 8.0])))
            if data.draw(st.booleans()):  # many ties
                layer.weight.copy_((layer.weight * 4).round())
    split = data.draw(st.integers(1, len(layers) - 1))
    groups = {"a": layers[:split], "b": layers[split:]}
    amount = data.draw(st.floats(0, 1))
    weights = {g: [x.weight.detach().clone() for x in group] for g, group in groups.items()}
    thresholds = global_module_aware_unstructured(
        {g: [(layer, "weight") for layer in group] for g, group in groups.items()}, amount=amount
    )
    for g, group in groups.items():
        count = round(amount * sum(w.numel() for w in weights[g]))
        expected, threshold = select_exactly(weights[g], count)
        assert thresholds[g] == pytest.approx(threshold)
        for layer, weight, mask in zip(group, weights[g], expected):
            assert torch.equal(layer.weight_mask, mask)
            assert torch.equal(layer.weight, weight * mask)
            assert torch.equal(layer.weight_orig, weight)


def test_each_layer_its_own_group_is_uniform_magnitude_pruning(swin):
    by_torch = copy.deepcopy(swin)
    pairs = [pair for group in group_parameters(swin).values() for pair in group]
    global_module_aware_unstructured({str(i): [p] for i, p in enumerate(pairs)}, amount=0.37)
    torch_pairs = [pair for group in group_parameters(by_torch).values() for pair in group]
    for module, name in torch_pairs:
        prune.l1_unstructured(module, name, amount=0.37)
    for ours, theirs in zip(masks_of(pairs), masks_of(torch_pairs), strict=True):
        assert torch.equal(ours, theirs != 0)


def test_one_group_is_lamp(net):
    pairs = pairs_of(net)
    flat = torch.cat([torch_dimap.dimap_scores(module.weight).flatten() for module, _ in pairs])
    count = 31
    threshold = global_module_aware_unstructured(pairs, amount=count)["all"]
    lowest = flat.argsort()[:count]
    expected = torch.ones_like(flat, dtype=torch.bool)
    expected[lowest] = False
    assert torch.equal(torch.cat([mask.flatten() for mask in masks_of(pairs)]), expected)
    assert threshold == pytest.approx(flat[lowest[-1]].item(), rel=1e-12)


def test_dimap_unstructured_in_torchs_global_call_gives_the_same_masks(net):
    by_torch = copy.deepcopy(net)
    for _ in range(2):  # on a repeat torch passes the unpruned entries only
        theirs = pairs_of(by_torch)
        sizes = [
            int(getattr(module, "weight_mask", torch.ones_like(module.weight)).sum())
            for module, _ in theirs
        ]
        prune.global_unstructured(
            theirs, pruning_method=DimapUnstructured, amount=0.4, sizes=sizes
        )
        global_module_aware_unstructured(pairs_of(net), amount=0.4)
        for a, b in zip(masks_of(pairs_of(net)), masks_of(theirs), strict=True):
            assert torch.equal(a, b != 0)


def test_dimap_unstructured_refuses_sizes_that_do_not_add_up(net):
    with pytest.raises(ValueError, match="sizes must add up to the 98 entries"):
        prune.global_unstructured(
            pairs_of(net), pruning_method=DimapUnstructured, amount=0.4, sizes=[48, 30]
        )


def test_torchs_global_call_without_sizes_is_refused_and_nothing_changes(net):
    before = state_of(net)
    message = "sizes must tell the layers apart .*call torch_dimap.global_module_aware_unstruct"
    with pytest.raises(ValueError, match=message):
        prune.global_unstructured(pairs_of(net), DimapUnstructured, amount=0.5)
    assert_same_state(before, state_of(net))


@pytest.mark.parametrize(("name", "left"), [("weight", (24, 12)), ("bias", (3, 1))])
def test_dimap_unstructured_works_through_torchs_apply(net, name, left):
    for kept in left:  # on a repeat torch passes a flat tensor
        DimapUnstructured.apply(net[0], name, amount=0.5)
        assert int(getattr(net[0], f"{name}_mask").sum()) == kept


def test_a_flat_tensor_that_is_pruned_alone_needs_no_sizes():
    t = torch.tensor([3.0, -1.0, 2.0, 0.5])
    assert DimapUnstructured(2).prune(t).tolist() == [3.0, 0.0, 2.0, 0.0]
    module = nn.Module()
    module.temp = nn.Parameter(t)  # what torch's global call names its joined tensor
    dimap_unstructured(module, "temp", amount=2)
    assert module.temp.tolist() == [3.0, 0.0, 2.0, 0.0]


def test_a_subclass_may_go_on_from_dimaps_choice(net):
    class AndOne(DimapUnstructured):
        def compute_mask(self, t, default_mask):
            mask = super().compute_mask(t, default_mask)
            mask[0] = 0
            return mask

    twin = copy.deepcopy(net)
    global_module_aware_unstructured(pairs_of(twin), amount=40)
    global_module_aware_unstructured(pairs_of(net), AndOne, amount=40)
    expected = masks_of(pairs_of(twin))
    expected[0][0, 0] = False
    for mask, want in zip(masks_of(pairs_of(net)), expected, strict=True):
        assert torch.equal(mask, want)


def test_amount_as_an_int_is_the_total_shared_in_proportion(net):
    groups = {"a": [(net[0], "weight")], "b": [(net[2], "weight"), (net[3], "weight")]}
    global_module_aware_unstructured(groups, amount=49)
    pruned = {g: sum(int((~m).sum()) for m in masks_of(pairs)) for g, pairs in groups.items()}
    assert pruned == {"a": 24, "b": 25}


def test_amount_as_a_dict_is_each_groups_own(net):
    groups = {"a": [(net[0], "weight")], "b": [(net[2], "weight")], "c": [(net[3], "weight")]}
    thresholds = global_module_aware_unstructured(groups, amount={"b": 7, "a": 0.5, "c": 0.0})
    assert [int((~m).sum()) for pairs in groups.values() for m in masks_of(pairs)] == [24, 7, 0]
    assert thresholds["c"] == 0.0


@pytest.mark.parametrize("amount", [np.float64(0.5), np.float32(0.5), np.int64(49)])
def test_amount_may_be_a_numpy_scalar(net, amount):
    global_module_aware_unstructured(pairs_of(net), amount=amount)
    assert sum(int(mask.sum()) for mask in masks_of(pairs_of(net))) == 49


@pytest.mark.parametrize("amount", [0, 0.0, 1.0, 98])
@pytest.mark.filterwarnings("ignore:.*no weight is left")
def test_amount_may_be_nothing_or_everything(net, amount):
    global_module_aware_unstructured(pairs_of(net), amount=amount)
    left = 98 - amount if isinstance(amount, int) else round(98 * (1 - amount))
    assert sum(int(mask.sum()) for mask in masks_of(pairs_of(net))) == left


def test_a_repeated_call_counts_and_chooses_unpruned_entries_only(net):
    pairs = pairs_of(net)
    weights = [module.weight.detach().clone() for module, _ in pairs]
    global_module_aware_unstructured(pairs, amount=0.5)
    first = masks_of(pairs)
    for module, _ in pairs:  # stale on purpose: the ranking must not read it
        module.weight = torch.full_like(module.weight_orig, 9.0)
    global_module_aware_unstructured(pairs, amount=0.5)
    expected, _ = select_exactly(weights, round(0.5 * 49), first)
    for mask, want, before in zip(masks_of(pairs), expected, first):
        assert torch.equal(mask, want) and not (mask & ~before).any()


def test_a_repeated_call_ranks_the_trained_weights(net):
    pairs = pairs_of(net)
    global_module_aware_unstructured(pairs, amount=0.5)
    with torch.no_grad():
        net[0].weight_orig.mul_(torch.rand_like(net[0].weight_orig))
    first = masks_of(pairs)
    weights = [module.weight_orig.detach() for module, _ in pairs]
    expected, _ = select_exactly(weights, 10, first)
    global_module_aware_unstructured(pairs, amount=10)
    assert all(torch.equal(a, b) for a, b in zip(masks_of(pairs), expected))


def test_importance_scores_stand_in_for_the_weights(net):
    pairs = pairs_of(net)
    scores = {pair: torch.rand(pair[0].weight.shape) for pair in pairs}
    global_module_aware_unstructured(pairs, importance_scores=scores, amount=40)
    expected, _ = select_exactly(list(scores.values()), 40)
    assert all(torch.equal(a, b) for a, b in zip(masks_of(pairs), expected))


def test_a_pair_with_none_is_ranked_by_its_weights(net):
    first, second, third = pairs_of(net)
    scores = {first: torch.rand(first[0].weight.shape), second: None, third: None}
    global_module_aware_unstructured([first, second, third], importance_scores=scores, amount=40)
    values = [scores[first], second[0].weight_orig.detach(), third[0].weight_orig.detach()]
    expected, _ = select_exactly(values, 40)
    assert all(torch.equal(a, b) for a, b in zip(masks_of([first, second, third]), expected))


@pytest.mark.parametrize("amount", [0.0004, {"all": 50}, 0, 51])
def test_what_is_no_slip_gives_no_warning(amount, recwarn):
    layer = nn.Linear(510, 100)
    global_module_aware_unstructured([(layer, "weight")], amount=amount)
    assert not recwarn.list


@pytest.mark.parametrize("prune_it", [
    lambda layer: global_module_aware_unstructured([(layer, "weight")], amount=50),
    lambda layer: dimap_unstructured(layer, "weight", 50),
])  # fmt: skip
def test_50_weights_of_many_give_a_warning(prune_it):
    layer = nn.Linear(510, 100)
    with pytest.warns(UserWarning, match="50 of 51,000 weights in all.*such as 0.5 for half"):
        prune_it(layer)
    assert int((~layer.weight_mask).sum()) == 50


@pytest.mark.parametrize("method", [prune.L1Unstructured, prune.RandomUnstructured])
def test_torchs_methods_are_applied_group_by_group(net, method):
    groups = {"a": [(net[0], "weight")], "b": [(net[2], "weight"), (net[3], "weight")]}
    for left in (24 + 25, 12 + 13):  # 48 -> 24 -> 12 and 50 -> 25 -> 13, rounding to even
        global_module_aware_unstructured(groups, pruning_method=method, amount=0.5)
        assert sum(int(m.sum()) for m in masks_of(pairs_of(net))) == left


def test_l1_in_a_group_equals_torchs_global_call(net):
    by_torch = copy.deepcopy(net)
    thresholds = global_module_aware_unstructured(
        pairs_of(net), pruning_method=prune.L1Unstructured, amount=0.6
    )
    prune.global_unstructured(pairs_of(by_torch), prune.L1Unstructured, amount=0.6)
    for a, b in zip(masks_of(pairs_of(net)), masks_of(pairs_of(by_torch)), strict=True):
        assert torch.equal(a, b != 0)
    gone = [m.weight_orig[~m.weight_mask].abs().max().item() for m, _ in pairs_of(net)]
    assert thresholds["all"] == pytest.approx(max(gone))


class ThresholdPruning(prune.BasePruningMethod):
    """A user's own method, without an amount."""

    PRUNING_TYPE = "unstructured"

    def __init__(self, threshold):
        self.threshold = threshold

    def compute_mask(self, t, default_mask):
        return (t.abs() > self.threshold).to(default_mask.dtype) * default_mask


def test_a_users_own_method_needs_no_amount(net):
    expected = [module.weight.detach().abs() > 0.1 for module, _ in pairs_of(net)]
    global_module_aware_unstructured(pairs_of(net), ThresholdPruning, threshold=0.1)
    assert all(torch.equal(a, b) for a, b in zip(masks_of(pairs_of(net)), expected))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_global_module_aware_unstructured_prunes_other_dtypes(net, dtype):
    net.to(dtype)
    global_module_aware_unstructured(pairs_of(net), amount=0.5)
    assert sum(int(mask.sum()) for mask in masks_of(pairs_of(net))) == 49
    assert all(module.weight.dtype == dtype for module, _ in pairs_of(net))


def test_generators_serve_as_pairs_and_as_groups(net):
    global_module_aware_unstructured((pair for pair in pairs_of(net)), amount=0.1)
    global_module_aware_unstructured({"a": (pair for pair in pairs_of(net))}, amount=0.1)


def test_biases_can_be_pruned_when_listed(net):
    dimap_unstructured(net[0], "bias", amount=2)
    assert int((net[0].bias == 0).sum()) == 2


# --- torch's mechanism ---------------------------------------------------------------


def test_it_leaves_behind_what_torch_does(net):
    by_torch = copy.deepcopy(net)
    original = net[0].weight
    assert dimap_unstructured(net[0], "weight", amount=0.5) is net[0]
    prune.l1_unstructured(by_torch[0], "weight", amount=0.5)
    assert prune.is_pruned(net)
    assert net.state_dict().keys() == by_torch.state_dict().keys()
    assert list(net[0]._parameters) == ["weight_orig", "bias"]  # where torch puts the bias first
    assert net[0].weight_orig is original  # an optimizer made before still trains it
    (hook,) = net[0]._forward_pre_hooks.values()
    assert isinstance(hook, DimapUnstructured)
    dimap_unstructured(net[0], "weight", amount=0.5)
    (hook,) = net[0]._forward_pre_hooks.values()
    assert isinstance(hook, prune.PruningContainer) and len(hook) == 2
    prune.remove(net[0], "weight")
    assert not prune.is_pruned(net) and int((net[0].weight == 0).sum()) == 36


def test_torchs_calls_go_on_top_and_below(net):
    prune.l1_unstructured(net[0], "weight", amount=8)
    dimap_unstructured(net[0], "weight", amount=8)
    prune.ln_structured(net[0], "weight", amount=1, n=2, dim=0)
    prune.random_unstructured(net[0], "weight", amount=4)
    prune.global_unstructured(pairs_of(net), prune.L1Unstructured, amount=10)
    dimap_unstructured(net[0], "weight", amount=1)
    (hook,) = net[0]._forward_pre_hooks.values()
    assert len(hook) == 6
    remove_all(net)
    assert not prune.is_pruned(net)


def test_remove_all_bakes_every_mask_and_keeps_the_output(swin, images):
    global_module_aware_unstructured(group_parameters(swin), amount=0.5)
    swin.eval()
    before = swin(images)
    assert remove_all(swin) is swin
    assert torch.equal(swin(images), before)
    assert not any("weight_mask" in name or "_orig" in name for name in swin.state_dict())
    remove_all(swin)  # nothing left to do


def test_remove_all_frees_the_graph_of_a_training_step(net):
    global_module_aware_unstructured(pairs_of(net), amount=0.5)
    net(torch.randn(2, 8)).sum().backward()
    remove_all(net)
    copy.deepcopy(net)


def test_zeros_stay_zero_through_adamw_with_weight_decay(swin, images):
    groups = group_parameters(swin)
    global_module_aware_unstructured(groups, amount=0.6)
    optimizer = torch.optim.AdamW(swin.parameters(), lr=1e-2, weight_decay=0.1)
    swin.train()
    for _ in range(20):
        optimizer.zero_grad()
        nn.functional.cross_entropy(swin(images), torch.arange(4)).backward()
        for pairs in groups.values():
            for module, _ in pairs:
                assert not module.weight_orig.grad[~module.weight_mask].any()
                assert not module.weight[~module.weight_mask].any()
        optimizer.step()
    remove_all(swin)
    zeros = sum(int((m.weight == 0).sum()) for pairs in groups.values() for m, _ in pairs)
    assert zeros == sum(
        round(0.6 * sum(m.weight.numel() for m, _ in pairs)) for pairs in groups.values()
    )


def adamw_step(model, x):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model(x).square().sum().backward()
    optimizer.step()
    return optimizer.state_dict()


def test_optimizer_states_line_up_with_a_dense_model_through_pruning_and_baking(net):
    x = torch.randn(5, 8)
    fresh = copy.deepcopy(net)
    dense_state = adamw_step(net, x)
    global_module_aware_unstructured(pairs_of(net), amount=0.5)
    net.zero_grad()
    torch.optim.AdamW(net.parameters()).load_state_dict(dense_state)
    order = [name.removesuffix("_orig") for name, _ in net.named_parameters()]
    assert order == [name for name, _ in fresh.named_parameters()]
    masked_state = adamw_step(net, x)
    remove_all(net)
    assert list(net.state_dict()) == list(fresh.state_dict())
    optimizer = torch.optim.AdamW(fresh.parameters())
    optimizer.load_state_dict(masked_state)
    for parameter, twin in zip(fresh.parameters(), net.parameters(), strict=True):
        assert optimizer.state[parameter]["exp_avg"].shape == parameter.shape == twin.shape
    fresh(x).sum().backward()
    optimizer.step()


def test_a_repeated_call_and_torchs_calls_leave_the_order_that_is_there(net):
    prune.identity(net[0], "weight")  # torch puts the weight behind the bias
    dimap_unstructured(net[0], "weight", amount=0.5)
    assert list(net[0]._parameters) == ["bias", "weight_orig"]
    remove_all(net)
    assert list(net[0]._parameters) == ["bias", "weight"]


def test_state_dicts_go_from_one_pruned_model_to_another(swin, images):
    other = copy.deepcopy(swin)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.1)
    global_module_aware_unstructured(group_parameters(swin), amount=0.6)
    # The documented line that makes a dense model ready to take a pruned state_dict:
    global_module_aware_unstructured(group_parameters(other), amount=0.0)
    other.load_state_dict(swin.state_dict())
    assert torch.equal(other.eval()(images), swin.eval()(images))


def test_masks_survive_half_and_float(net):
    dimap_unstructured(net[0], "weight", amount=0.5)
    mask = net[0].weight_mask.clone()
    net.half().float()
    assert net[0].weight_mask.dtype == torch.bool and torch.equal(net[0].weight_mask, mask)


def test_a_mask_has_the_layout_of_its_weight():
    conv = nn.Conv2d(4, 8, 3).to(memory_format=torch.channels_last)
    dimap_unstructured(conv, "weight", amount=0.5)
    assert conv.weight_mask.stride() == conv.weight.stride() == conv.weight_orig.stride()


def test_a_pruned_model_goes_into_emas_and_copies(swin, images):
    global_module_aware_unstructured(group_parameters(swin), amount=0.5)
    swin.eval()
    ema, averaged = ModelEmaV3(swin, decay=0.5), AveragedModel(swin)
    for _ in range(2):
        ema.update(swin)
        averaged.update_parameters(swin)
    for other in (copy.deepcopy(swin), ema.module, averaged, pickle.loads(pickle.dumps(swin))):
        assert torch.equal(other(images), swin(images))


def assert_same_masks(model, other):
    masks = [(a, b) for a, b in zip(model.buffers(), other.buffers()) if a.dtype == torch.bool]
    assert masks and all(torch.equal(a, b) for a, b in masks)


@pytest.mark.parametrize(
    ("make", "update"),
    [
        (lambda model: ModelEmaV3(model, decay=0.9), "update"),
        (lambda model: ModelEmaV3(model, decay=0.9, foreach=False), "update"),
        (AveragedModel, "update_parameters"),
    ],
)
def test_an_ema_follows_the_masks_of_a_second_round(swin, make, update):
    groups = group_parameters(swin)
    global_module_aware_unstructured(groups, amount=0.3)
    ema = make(swin)
    global_module_aware_unstructured(groups, amount=0.3)
    getattr(ema, update)(swin)
    assert_same_masks(swin, ema.module)


def test_an_ema_that_averages_masks_needs_them_copied_after_a_second_round(swin):
    groups = group_parameters(swin)
    global_module_aware_unstructured(groups, amount=0.3)
    ema = ModelEmaV2(swin, decay=0.9)  # ema.copy_(decay * ema + (1 - decay) * value)
    ema.update(swin)
    assert_same_masks(swin, ema.module)
    global_module_aware_unstructured(groups, amount=0.3)
    ema.update(swin)
    with pytest.raises(AssertionError):  # an average of True and False is True
        assert_same_masks(swin, ema.module)
    # The documented line:
    masks = {key: value for key, value in swin.state_dict().items() if key.endswith("_mask")}
    ema.module.load_state_dict(masks, strict=False)
    for _ in range(2):
        ema.update(swin)
    assert_same_masks(swin, ema.module)


def test_a_pickled_swin_tiny_holds_its_masks_once():
    model = timm.create_model("swin_tiny_patch4_window7_224")
    dense = len(pickle.dumps(model))
    global_module_aware_unstructured(group_parameters(model), amount=0.5)
    assert len(pickle.dumps(model)) < 2.2 * dense  # weights twice, masks at a quarter


# --- refusals ------------------------------------------------------------------------


def nan_weight(net):
    with torch.no_grad():
        net[2].weight[0, 0] = float("nan")
    return pairs_of(net)


def meta_weight(net):
    net[3].to("meta")
    return pairs_of(net)


def shared_weight(net):
    twin = nn.Linear(8, 6)
    twin.weight = net[0].weight
    return {"a": [(net[0], "weight")], "b": [(twin, "weight")]}


def lost_hook(net):
    prune.l1_unstructured(net[0], "weight", amount=0.1)
    with pytest.raises(ValueError):  # torch drops its hook before it looks at the amount
        prune.l1_unstructured(net[0], "weight", amount=10**6)
    return pairs_of(net)


def fractional_mask(net):
    prune.l1_unstructured(net[0], "weight", amount=0.1)
    net[0].weight_mask.mul_(0.5)
    return pairs_of(net)


def parametrized(net):
    nn.utils.parametrizations.weight_norm(net[0])
    return pairs_of(net)


def name_taken(net):
    net[0].weight_mask = torch.ones(1)
    return pairs_of(net)


def behind_a_mask(net):
    prune.identity(net[0], "weight")
    return [(net[0], "weight_orig")]


def integer_parameter(net):
    net[0].weight = nn.Parameter(torch.ones(6, 8, dtype=torch.int8), requires_grad=False)
    return pairs_of(net)


BAD_PARAMETERS = [
    (lambda net: 3, TypeError, "parameters must be a mapping .* found int"),
    (lambda net: net, TypeError, "found Sequential: see group_parameters"),
    (lambda net: [], ValueError, "parameters holds no weights"),
    (lambda net: {}, ValueError, "parameters is empty"),
    (lambda net: {"a": pairs_of(net), "b": []}, ValueError, r"parameters\['b'\] holds no weights"),
    (lambda net: {"a": None}, TypeError, r"parameters\['a'\] must be an iterable .* NoneType"),
    (lambda net: {"a": net}, TypeError, r"parameters\['a'\] must be an iterable .* Sequential"),
    (lambda net: [net[0]], TypeError, r"parameters\[0\] must be a \(module, name\) pair"),
    (lambda net: [(net[0], 1)], TypeError, r"parameters\[0\] must be a \(module, name\) pair"),
    (lambda net: pairs_of(net) * 2, ValueError, r"parameters\[3\] .* same tensor as .*\[0\]"),
    (shared_weight, ValueError, r"parameters\['b'\]\[0\] .* same tensor as parameters\['a'\]\[0\]"),
    (lambda net: [(net[0], "wait")], ValueError, r"Linear\.wait.* there are weight, bias"),
    (lambda net: [(net[0], "in_features")], ValueError, "must be a parameter of its module"),
    (nan_weight, ValueError, r"parameters\[1\] \(Linear.weight\) holds NaN"),
    (meta_weight, ValueError, r"parameters\[2\] \(Linear.weight\) is on the meta device"),
    (integer_parameter, TypeError, "found torch.int8"),
    (lost_hook, RuntimeError, r"parameters\[0\] .* incompletely: .* found 0 hooks"),
    (fractional_mask, ValueError, "must hold 0 and 1 only"),
    (parametrized, ValueError, "computed by a parametrization"),
    (name_taken, ValueError, "needs the name weight_mask"),
    (behind_a_mask, ValueError, "name the pruned tensor, 'weight'"),
]


@pytest.mark.parametrize(("prepare", "error", "message"), BAD_PARAMETERS)
def test_bad_parameters_are_refused_and_nothing_changes(net, prepare, error, message):
    parameters = prepare(net)
    before = state_of(net) if message.find("meta") < 0 else []
    with pytest.raises(error, match=message):
        global_module_aware_unstructured(parameters, amount=0.5)
    if before:
        assert_same_equal_nan(before, state_of(net))


def assert_same_equal_nan(before, after):
    clean = [
        [tuple({k: (i, v.nan_to_num()) for k, (i, v) in t.items()} for t in row[:2]) + row[2:]
         for row in rows]
        for rows in (before, after)
    ]  # fmt: skip
    assert_same_state(*clean)


@pytest.mark.parametrize(
    ("amount", "error", "message"),
    [
        (-0.1, ValueError, r"must lie in \[0, 1\], found -0.1"),
        (1.5, ValueError, r"must lie in \[0, 1\], found 1.5"),
        (float("nan"), ValueError, r"must lie in \[0, 1\], found nan"),
        (-1, ValueError, "must not be negative"),
        (99, ValueError, "asks to prune 99, but only 98 are unpruned"),
        (True, TypeError, "found bool"),
        ("half", TypeError, "found str"),
        (None, TypeError, "missing .* argument: 'amount'"),
        (torch.tensor(0.5), TypeError, "found Tensor"),
        ({"a": 0.5}, ValueError, r"must name the groups \['all'\], found \['a'\]"),
        ({}, ValueError, "must name the groups"),
        ({"all": 2.0}, ValueError, r"amount\['all'\] as a float must lie"),
        ({"all": 99}, ValueError, r"amount\['all'\] asks to prune 99"),
        ({"all": True}, TypeError, r"amount\['all'\] must be an int"),
    ],
)
@pytest.mark.parametrize("repeated", [False, True])
def test_bad_amounts_are_refused_and_nothing_changes(net, amount, error, message, repeated):
    if repeated:
        global_module_aware_unstructured(pairs_of(net), amount=0)
    before = state_of(net)
    with pytest.raises(error, match=message):
        global_module_aware_unstructured(pairs_of(net), amount=amount)
    assert_same_state(before, state_of(net))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda s, p: s.pop(p[1]), ValueError, r"importance_scores has none for parameters\[1\]"),
        (lambda s, p: s.update({p[0]: torch.ones(8, 6)}), ValueError, r"shape \(6, 8\), found"),
        (lambda s, p: s[p[0]].fill_(float("nan")), ValueError, "NaN or infinite"),
        (lambda s, p: s.update({p[0]: [1.0]}), TypeError, "must be a tensor, found list"),
        (lambda s, p: s.update({p[0]: torch.ones(6, 8).int()}), TypeError, "found torch.int32"),
        (
            lambda s, p: s.update({(p[0][0], "bias"): torch.ones(6)}),
            ValueError,
            "must be for pairs listed in parameters, found 1 more",
        ),
    ],
)
def test_bad_scores_are_refused_and_nothing_changes(net, change, error, message):
    pairs = pairs_of(net)
    scores = {pair: torch.rand(pair[0].weight.shape) for pair in pairs}
    change(scores, pairs)
    before = state_of(net)
    with pytest.raises(error, match=message):
        global_module_aware_unstructured(pairs, importance_scores=scores, amount=0.5)
    assert_same_state(before, state_of(net))


@pytest.mark.parametrize(
    ("method", "kwargs", "message"),
    [
        (prune.LnStructured, {"amount": 1, "n": 2}, "PRUNING_TYPE 'unstructured', found 'struct"),
        (nn.Linear, {"in_features": 1, "out_features": 1}, "found None"),
        ("l1", {"amount": 1}, "must be a pruning class, .* found str"),
        (DimapUnstructured, {"amount": 1, "sizes": [98]}, "sizes follow from parameters"),
        (DimapUnstructured, {}, "amount"),
        (DimapUnstructured(0.5), {}, "must be a pruning class, .* found DimapUnstructured"),
        (prune.L1Unstructured, {"amount": 1, "n": 2}, "unexpected keyword argument 'n'"),
        (DimapUnstructured, {"amont": 0.5}, "unexpected keyword argument 'amont'"),
    ],
)
def test_bad_methods_are_refused_and_nothing_changes(net, method, kwargs, message):
    before = state_of(net)
    with pytest.raises(TypeError, match=message):
        global_module_aware_unstructured(pairs_of(net), method, **kwargs)
    assert_same_state(before, state_of(net))


def test_amount_is_in_the_signature():
    signature = inspect.signature(global_module_aware_unstructured)
    assert signature.parameters["amount"].kind is inspect.Parameter.KEYWORD_ONLY


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda net: dimap_unstructured(net[0], "weight", 2.0), "dimap_unstructured"),
        (lambda net: dimap_unstructured(net[0], "wait", 0.5), "dimap_unstructured"),
        (lambda net: prune_to_parameters(net, 0.9, [(net[0], "wait")]), "prune_to_parameters"),
        (lambda net: prune_to_parameters(net, 0.9, []), "prune_to_parameters"),
        (
            lambda net: prune_to_flops(net, torch.zeros(1, 8), 0.9, pairs_of(net), None, {}),
            "prune_to_flops",
        ),
    ],
)
def test_refusals_name_the_function_that_was_called(net, call, name):
    with pytest.raises(ValueError, match=rf"^{name}\(\): "):
        call(net)


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda net: dimap_unstructured(net[0], "weight", 1.0), "dimap_unstructured"),
        (
            lambda net: global_module_aware_unstructured(pairs_of(net), amount=1.0),
            "global_module_aware_unstructured",
        ),
        (lambda net: prune_to_parameters(net, 15, pairs_of(net)), "prune_to_parameters"),
    ],
)
def test_warnings_point_at_the_line_that_called(net, call, name):
    with pytest.warns(UserWarning, match=rf"^{name}\(\): no weight is left") as caught:
        call(net)
    assert [warning.filename for warning in caught] == [__file__]


def test_importance_scores_that_are_no_mapping_are_refused(net):
    with pytest.raises(TypeError, match="importance_scores must be a mapping .* found list"):
        global_module_aware_unstructured(pairs_of(net), importance_scores=[1], amount=0.5)


@pytest.mark.parametrize("repeated", [False, True])
def test_a_failure_half_way_puts_everything_back(net, repeated, monkeypatch):
    if repeated:
        global_module_aware_unstructured(pairs_of(net), amount=0.2)
    handle = net[0].register_forward_pre_hook(lambda module, inputs: None)
    before = state_of(net)

    def interrupted(hook):
        raise KeyboardInterrupt

    monkeypatch.setattr(net[3], "register_forward_pre_hook", interrupted, raising=False)
    with pytest.raises(KeyboardInterrupt):
        global_module_aware_unstructured(pairs_of(net), amount=0.5)
    assert_same_state(before, state_of(net))
    handle.remove()
    assert len(net[0]._forward_pre_hooks) == int(repeated)
    net(torch.randn(2, 8))


@pytest.mark.filterwarnings("error:.*no weight is left")
def test_a_warning_that_is_an_error_changes_nothing(net):
    before = state_of(net)
    with pytest.raises(UserWarning, match="no weight is left"):
        global_module_aware_unstructured([(net[0], "weight")], amount=1.0)
    assert_same_state(before, state_of(net))


def test_remove_all_checks_before_it_bakes(net):
    global_module_aware_unstructured(pairs_of(net), amount=0.5)
    del net[3]._buffers["weight_mask"]
    with pytest.raises(RuntimeError, match="remove_all.*: 3.weight must have"):
        remove_all(net)
    assert "weight_orig" in net[0]._parameters
    with pytest.raises(TypeError, match="found NoneType"):
        remove_all(None)


def test_a_subclass_with_a_ranking_of_its_own_is_asked_for_it(net):
    class KeepsLowest(DimapUnstructured):
        def compute_mask(self, t, default_mask):
            mask = torch.zeros_like(default_mask)
            mask[t.abs().argmin()] = 1
            return mask

    with pytest.warns(UserWarning, match="no weight is left"):
        global_module_aware_unstructured(pairs_of(net), KeepsLowest, amount=0.5)
    assert sum(int(mask.sum()) for mask in masks_of(pairs_of(net))) == 1


def test_a_layer_left_without_weights_warns_once(net):
    with pytest.warns(UserWarning, match=r"no weight is left in parameters\[0\] \(Linear.weight\)"):
        global_module_aware_unstructured([(net[0], "weight")], amount=1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_default_device_does_not_matter(net, dtype):
    other = copy.deepcopy(net.to(dtype))
    for model, device in ((net, "cpu"), (other, "meta")):
        for amount in (0.3, 0.5):  # dense, then masked
            with torch.device(device):
                global_module_aware_unstructured(pairs_of(model), amount=amount)
    for one, two in zip(pairs_of(net), pairs_of(other)):
        assert torch.equal(one[0].weight_mask, two[0].weight_mask)

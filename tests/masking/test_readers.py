"""Masks hold in every forward, also in layers that a model reads without calling them."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
import torchvision
from backbones import BYPASSING, FAMILIES, baked, build, images, outputs
from torch import nn
from torch.nn.utils import prune
from torchvision.models.feature_extraction import create_feature_extractor

import torch_dimap
from torch_dimap.masking import readers as hooks

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(params=BYPASSING)
def family(request):
    return request.param


@pytest.fixture
def model(family):
    return pruned(build(family))


def pruned(model, amount=0.55):
    groups = torch_dimap.group_parameters(model)
    torch_dimap.global_module_aware_unstructured(groups, amount=amount)
    return model


def readers(model):
    return [m for m in model.modules() if hooks.refresh in m._forward_pre_hooks.values()]


def pre_hooks(model):
    return [hook for m in model.modules() for hook in m._forward_pre_hooks.values()]


def assert_holds(model, family):
    """Check train and eval against a dense model made from the state alone."""
    for training in (True, False):
        x = images(family).to(next(model.parameters()).dtype)
        model.train(training)
        assert torch.equal(outputs(model, x), outputs(baked(model, family), x))


# what may change a model between two forwards


def test_the_families_do_bypass_layers(model, family):
    layers = {m for m in model.modules() if hooks.pruning_methods(m)}
    called = set()
    for layer in layers:
        layer.register_forward_hook(lambda m, *_: called.add(m))
    outputs(model, images(family))
    assert layers - called  # or the tests below test nothing


def test_two_backward_passes_in_a_row(model, family):
    x = images(family)
    for _ in range(2):
        outputs(model.train(), x).sum().backward()
    once = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    outputs(model, x).sum().backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(once[name], 2 * p.grad)


def test_an_optimizer_step_is_seen(model, family):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        outputs(model.train(), images(family)).sum().backward()
        optimizer.step()
        assert_holds(model, family)


@pytest.mark.parametrize("assign", [False, True])
def test_load_state_dict_is_seen(model, family, assign):
    outputs(model, images(family)).sum().backward()
    other = build(family)
    for p in other.parameters():
        nn.init.normal_(p, std=0.1)
    model.load_state_dict(pruned(other, 0.3).state_dict(), assign=assign)
    assert_holds(model, family)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_change_of_dtype_is_seen(model, family, dtype):
    outputs(model, images(family))
    model.to(dtype)
    assert_holds(model, family)


def test_half_is_seen(model, family):
    outputs(model, images(family))
    model.half()
    assert outputs(model.eval(), images(family).half()).dtype == torch.float16
    for module in model.modules():
        for method in hooks.pruning_methods(module):
            assert getattr(module, method._tensor_name).dtype == torch.float16


def test_a_forward_without_gradients_in_between_does_no_harm(model, family):
    x = images(family)
    with torch.no_grad():
        outputs(model, x)
    outputs(model.train(), x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_a_second_round_of_pruning_holds(model, family):
    before = len(pre_hooks(model))
    pruned(model, 0.5)
    assert len(pre_hooks(model)) == before
    assert_holds(model, family)


# copies and undoing


def test_a_deep_copy_holds_for_itself(model, family):
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for p in twin.parameters():
            p.add_(0.01)
    assert_holds(twin, family)
    assert_holds(model, family)


def test_a_pickled_model_holds(model, family):
    twin = pickle.loads(pickle.dumps(model))
    with torch.no_grad():
        for p in twin.parameters():
            p.add_(0.01)
    assert_holds(twin, family)


def test_pickling_works_after_a_training_forward(model, family):
    outputs(model.train(), images(family)).sum().backward()
    assert_holds(pickle.loads(pickle.dumps(model)), family)


def test_a_deep_copy_works_after_a_forward_without_gradients(model, family):
    outputs(model.train(), images(family)).sum().backward()
    with pytest.raises(RuntimeError, match="deepcopy"):  # torch's limit, with any pruning
        copy.deepcopy(model)
    with torch.no_grad():
        outputs(model, images(family))
    assert_holds(copy.deepcopy(model), family)


def test_an_average_of_models_holds(model, family):
    average = torch.optim.swa_utils.AveragedModel(model)
    average.update_parameters(model)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1)
    average.update_parameters(model)
    assert_holds(average.module, family)


def test_remove_all_leaves_no_hook(model, family):
    outputs(model.eval(), images(family))
    before = outputs(model, images(family))
    assert torch_dimap.remove_all(model) is model
    assert pre_hooks(model) == []
    assert torch.equal(outputs(model, images(family)), before)


def test_torch_prune_remove_leaves_no_hook_after_the_next_forward(model, family):
    before = outputs(model.eval(), images(family))
    for module in model.modules():
        for method in hooks.pruning_methods(module):
            prune.remove(module, method._tensor_name)
    assert torch.equal(outputs(model, images(family)), before)
    assert pre_hooks(model) == []


def test_state_dict_keys_are_those_of_torch(model, family):
    other = build(family)
    for module, name in (p for ps in torch_dimap.group_parameters(other).values() for p in ps):
        prune.identity(module, name)
    assert model.state_dict().keys() == other.state_dict().keys()


def test_a_failed_call_leaves_no_hook(family, monkeypatch):
    model = build(family)
    groups = torch_dimap.group_parameters(model)

    def fail(reader):
        hooks.hold(reader)
        raise KeyboardInterrupt

    monkeypatch.setattr("torch_dimap.masking.pruning.hold", fail)
    with pytest.raises(KeyboardInterrupt):
        torch_dimap.global_module_aware_unstructured(groups, amount=0.5)
    assert pre_hooks(model) == []
    assert model.state_dict().keys() == build(family).state_dict().keys()


# who gets a hook


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_that_are_not_called_have_readers_with_a_hook(family):
    if family.startswith("transformers"):
        pytest.importorskip("transformers")
    model = pruned(build(family))
    called = set()
    for module in model.modules():
        module.register_forward_hook(lambda m, *_: called.add(m))
    for training in (True, False):
        called.clear()
        outputs(model.train(training), images(family))
        held = {
            layer
            for reader in readers(model)
            if reader in called
            for layer, _ in hooks._pruned_inside(reader)
        }
        for module in model.modules():
            assert not hooks.pruning_methods(module) or module in called | held


@pytest.mark.parametrize("family", ["swin", "swinv2_cr", "pvt_v2", "hiera", "vit", "maxvit"])
def test_models_that_call_their_layers_get_no_more_hooks_than_torch_gives(family):
    assert readers(pruned(build(family))) == []


class Called(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(4, 4, bias=False)

    def forward(self, x):
        return self.qkv(x)


class Reads(Called):
    def forward(self, x):
        return F.linear(x, self.qkv.weight)


class ReadsByName(Called):
    def forward(self, x):
        return F.linear(x, getattr(self, "qkv").weight)


class PassesOn(Called):
    def forward(self, x):
        return multiply(self.qkv, x)


class ReadsFromList(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.ModuleList([nn.Linear(4, 4, bias=False)])

    def forward(self, x):
        return F.linear(x, self.qkv[0].weight)


class Inherits(Reads):
    pass


class Overrides(Called):
    def forward(self, x):
        return self.attend(x)

    def attend(self, x):
        return self.qkv(x)


class OverridesAgain(Overrides):
    def attend(self, x):
        return multiply(next(self.children()), x)


def multiply(layer, x):
    return F.linear(x, layer.weight)


class HandsItselfOn(Called):
    def forward(self, x, quick=False):
        return self.qkv(x) if quick else multiply_qkv(self, x)


def multiply_qkv(block, x):
    return F.linear(x, block.qkv.weight)


def patched():
    module = Called()
    module.forward = lambda x: F.linear(x, module.qkv.weight)
    return module


@pytest.mark.parametrize(
    "make",
    [Reads, ReadsByName, PassesOn, ReadsFromList, Inherits, OverridesAgain, HandsItselfOn, patched],
)
def test_masks_hold_however_a_reader_gets_at_the_weight(make):
    model = nn.ModuleDict({"attn": make()})
    [pair] = torch_dimap.group_parameters(model)["qkv"]
    torch_dimap.dimap_unstructured(*pair, amount=0.5)
    with torch.no_grad():
        pair[0].weight_orig.normal_()
    x = torch.randn(3, 4)
    for _ in range(2):
        out = model["attn"](x)
        assert torch.equal(out, x @ (pair[0].weight_orig * pair[0].weight_mask).T)
        out.sum().backward()


def test_a_class_patched_from_outside_counts_as_a_reader(monkeypatch):
    class Victim(Called):
        pass

    assert not readers(pruned(nn.ModuleDict({"attn": Victim()})))
    monkeypatch.setattr(Victim, "forward", Reads.forward)
    assert readers(pruned(nn.ModuleDict({"attn": Victim()})))


def test_a_layer_shared_by_two_readers_holds_in_both():
    first, second = Called(), Reads()
    second.qkv = first.qkv
    model = nn.ModuleDict({"attn": first, "self_attn": second})
    assert readers(pruned(model)) == [second]


def test_masks_hold_in_a_traced_feature_extractor():
    torch.manual_seed(0)
    dense = FAMILIES["torchvision swin"][0]()
    model = create_feature_extractor(dense, ["flatten"]).train()
    pruned(model)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.5)
    x = images("torchvision swin")
    expected = model(x)["flatten"]
    torch_dimap.remove_all(model)
    assert torch.equal(model(x)["flatten"], expected)


def test_hold_masks_serves_layers_pruned_by_torch():
    torch.manual_seed(0)
    model = torchvision.models.VisionTransformer(32, 8, 1, 2, 16, 32)
    layer = model.encoder.layers[0].self_attention.out_proj
    prune.l1_unstructured(layer, "weight", 0.5)
    assert torch_dimap.hold_masks(model) is model
    for _ in range(2):
        model(images("torchvision vit")).sum().backward()
    torch_dimap.remove_all(model)
    assert pre_hooks(model) == []


def test_hold_masks_refuses_what_is_no_model():
    with pytest.raises(TypeError, match="hold_masks.*: model must be an nn.Module, found list"):
        torch_dimap.hold_masks([nn.Linear(2, 2)])


def test_hold_masks_leaves_a_dense_model_alone():
    assert pre_hooks(torch_dimap.hold_masks(build("torchvision swin"))) == []


def test_survey_names_every_module_and_its_readers():
    model = nn.Sequential(ReadsFromList())
    places = hooks.survey(model)
    assert [place.name for place in places.values()] == ["", "0", "0.qkv", "0.qkv.0"]
    assert places[model[0].qkv[0]].readers == [(model[0], "qkv")]
    assert places[model].readers == []

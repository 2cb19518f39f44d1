"""Every family, pruned: exact amounts, nothing else touched, right outputs, and training."""

from __future__ import annotations

import pytest
import torch
from backbones import FAMILIES, baked, build, images, outputs
from torch.nn.utils import prune

import torch_dimap

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(params=FAMILIES)
def family(request):
    if request.param.startswith("transformers"):
        pytest.importorskip("transformers")
    return request.param


@pytest.fixture
def model(family):
    return build(family)


def test_group_parameters_and_the_rest_are_all_parameters(model):
    groups = torch_dimap.group_parameters(model)
    grouped = [getattr(*pair) for pairs in groups.values() for pair in pairs]
    everything = set(model.parameters())
    assert len(grouped) == len(set(grouped))
    assert set(grouped) < everything
    rest = everything - set(grouped)
    assert sum(p.numel() for p in grouped) + sum(p.numel() for p in rest) == sum(
        p.numel() for p in model.parameters()
    )


def test_pruning_removes_the_exact_amount_of_each_group_and_nothing_else(model):
    groups = torch_dimap.group_parameters(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    torch_dimap.global_module_aware_unstructured(groups, amount=0.55)
    for pairs in groups.values():
        masks = [getattr(module, f"{name}_mask") for module, name in pairs]
        total = sum(mask.numel() for mask in masks)
        assert sum(int((~mask).sum()) for mask in masks) == round(0.55 * total)
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name.removesuffix("_orig")])


@pytest.mark.parametrize("training", [True, False])
def test_a_pruned_model_gives_the_outputs_of_the_baked_one(model, family, training):
    torch_dimap.global_module_aware_unstructured(
        torch_dimap.group_parameters(model), amount=0.55
    )
    model.train(training)
    dense = baked(model, family)
    assert torch.equal(outputs(model, images(family)), outputs(dense, images(family)))


def test_remove_all_keeps_the_outputs_bit_for_bit(model, family):
    torch_dimap.global_module_aware_unstructured(
        torch_dimap.group_parameters(model), amount=0.55
    )
    model.eval()
    before = outputs(model, images(family))
    torch_dimap.remove_all(model)
    assert torch.equal(outputs(model, images(family)), before)
    assert not prune.is_pruned(model)
    assert model.state_dict().keys() == build(family).state_dict().keys()


def test_gradients_are_those_of_the_baked_model_where_weights_are_kept(model, family):
    groups = torch_dimap.group_parameters(model)
    torch_dimap.global_module_aware_unstructured(groups, amount=0.55)
    names = {module: name for name, module in model.named_modules()}
    dense = baked(model.train(), family)
    for one in (model, dense):
        outputs(one, images(family)).sum().backward()
    for module, name in (pair for pairs in groups.values() for pair in pairs):
        expected = dense.get_parameter(f"{names[module]}.{name}").grad
        found = getattr(module, f"{name}_orig").grad
        assert torch.equal(found, expected * getattr(module, f"{name}_mask"))


def test_the_forward_after_an_optimizer_step_uses_the_new_weights(model, family):
    torch_dimap.global_module_aware_unstructured(
        torch_dimap.group_parameters(model), amount=0.55
    )
    x = images(family)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    outputs(model.train(), x).sum().backward()
    optimizer.step()
    for training in (True, False):
        model.train(training)
        dense = baked(model, family)
        assert torch.equal(outputs(model, x), outputs(dense, x))

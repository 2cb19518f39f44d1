"""Units that leave the model: the same outputs from smaller tensors."""

from __future__ import annotations

import copy
import pickle

import pytest
import timm
import torch
from conftest import make_swin
from torch import nn
from torch.nn.utils import prune

from torch_dimap import (
    global_module_aware_structured,
    global_module_aware_unstructured,
    group_parameters,
    group_units,
    remove_all,
    remove_units,
)
from torch_dimap.units import cut_units

pytestmark = pytest.mark.usefixtures("one_thread")


def make_vit(**kwargs) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=4, in_chans=1, num_classes=10,
        embed_dim=32, depth=3, num_heads=4, **kwargs,
    )  # fmt: skip


MODELS = {"swin": make_swin, "vit": make_vit}


@pytest.fixture(params=MODELS)
def model(request):
    """A model with weights that no initialisation makes alike."""
    model = MODELS[request.param]()
    for p in model.parameters():
        p.data += 0.05 * torch.randn_like(p)
    return model


def scores_at_random(units, seed):
    """Uneven numbers of units go from every layer."""
    generator = torch.Generator().manual_seed(seed)
    return {
        layer: torch.rand(layer.units, generator=generator)
        * torch.rand((), generator=generator)
        for layers in units.values()
        for layer in layers
    }


def mask_unevenly(model, amount=0.5, seed=0, **kwargs):
    units = group_units(model)
    return global_module_aware_structured(
        units, amount, scores_at_random(units, seed), multiple=1,
        pruning_method=prune.L1Unstructured, **kwargs,
    )  # fmt: skip


def masked(model):
    """Count the zeros of all masks."""
    return sum(int((~b).sum()) for b in model.buffers() if b.dtype == torch.bool)


def gradients_of_what_stays(model):
    """Return the gradients of a masked model, without those of its dead units."""
    found = {id(p): p.grad for p in model.parameters() if p.grad is not None}
    for layer in (layer for layers in group_units(model).values() for layer in layers):
        keep = layer.alive()
        for part in layer.parts:
            if id(part.tensor) in found:
                index = part.along(keep).nonzero().flatten()
                found[id(part.tensor)] = found[id(part.tensor)].index_select(part.dim, index)
    return {
        name.removesuffix("_orig"): found[id(p)]
        for name, p in model.named_parameters()
        if id(p) in found and found[id(p)].numel()
    }


@pytest.mark.parametrize("minimum", [0, 1])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.float64, 1e-12)]
)
def test_remove_units_keeps_outputs_and_gradients(model, images, dtype, tolerance, minimum):
    model, images = model.to(dtype).eval(), images.to(dtype)
    for seed in range(2):  # several rounds
        mask_unevenly(model, 0.4, seed, minimum=minimum)
        expected = model(images)
        expected.square().sum().backward()
        gradients = gradients_of_what_stays(model)
        model.zero_grad()
        remove_units(model)
        found = model(images)
        assert (found - expected).abs().max() <= tolerance * expected.abs().max()
        found.square().sum().backward()
        largest = max(float(gradient.abs().max()) for gradient in gradients.values())
        assert largest > 0.01
        for name, gradient in gradients.items():
            difference = model.get_parameter(name).grad - gradient
            assert difference.abs().max() <= tolerance * largest
        model.zero_grad()


def test_remove_units_makes_the_tensors_smaller_and_the_attributes_follow(model):
    done = mask_unevenly(model)
    remove_units(model)
    for name, heads in done["heads"].kept.items():
        attention = model.get_submodule(name)
        width = attention.proj.in_features
        assert attention.num_heads == heads
        assert attention.proj.weight.shape[1] == width
        assert attention.qkv.weight.shape[0] == attention.qkv.out_features == 3 * width
    for name, neurons in done["neurons"].kept.items():
        mlp = model.get_submodule(name)
        assert mlp.fc1.out_features == mlp.fc2.in_features == len(mlp.fc1.bias) == neurons
    assert not prune.is_pruned(model)
    assert all("_orig" not in name for name, _ in model.named_parameters())
    described = {x.name: x.units for layers in group_units(model).values() for x in layers}
    assert described == {**done["heads"].kept, **done["neurons"].kept}


def test_remove_units_after_remove_all_is_the_same(model, images):
    mask_unevenly(model)
    other = remove_units(remove_all(copy.deepcopy(model)))
    remove_units(model)
    assert all(map(torch.equal, model.parameters(), other.parameters()))


def test_remove_units_keeps_what_is_half_dead(model, images):
    model.eval()
    global_module_aware_unstructured(group_parameters(model), amount=0.5)
    mask_unevenly(model)
    expected = model(images)
    zeros = masked(model)
    remove_units(model)
    assert prune.is_pruned(model)
    assert 0 < masked(model) < zeros
    assert (model(images) - expected).abs().max() <= 2e-6 * expected.abs().max()
    remove_all(model)
    assert (model(images) - expected).abs().max() <= 2e-6 * expected.abs().max()


def test_remove_units_leaves_a_model_without_dead_units_as_it_is(model):
    before = {name: (p, p.data_ptr()) for name, p in model.named_parameters()}
    remove_units(model)
    after = {name: (p, p.data_ptr()) for name, p in model.named_parameters()}
    assert all(after[name][0] is p and after[name][1] == at for name, (p, at) in before.items())


def test_a_slim_model_trains_is_copied_and_pickled(model, images):
    mask_unevenly(model, minimum=0)
    remove_units(model)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    model.train()(images).square().sum().backward()
    optimizer.step()
    model.eval()
    expected = model(images)
    assert torch.equal(copy.deepcopy(model)(images), expected)
    assert torch.equal(pickle.loads(pickle.dumps(model))(images), expected)


def test_remove_units_refuses_a_norm_over_neurons_by_name(images):
    model = make_vit(scale_mlp_norm=True).eval()
    with pytest.warns(UserWarning, match="blocks.0.mlp .neurons.: norm mixes them"):
        units = group_units(model)
    assert list(units) == ["heads"]
    prune.ln_structured(model.blocks[1].mlp.fc2, "weight", amount=0.5, n=2, dim=1)
    before = model.state_dict()
    with pytest.raises(RuntimeError, match="blocks.1.mlp .norm mixes them"):
        remove_units(model)
    assert all(map(torch.equal, before.values(), model.state_dict().values()))


def test_cut_units_makes_room_for_the_weights_of_a_slim_model(model, images):
    fresh = copy.deepcopy(model).eval()
    done = mask_unevenly(model.eval())
    remove_units(model)
    cut_units({
        layer: torch.arange(layer.units) < done[group].kept[layer.name]
        for group, layers in group_units(fresh).items()
        for layer in layers
    })  # fmt: skip
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(images), model(images))

"""Gates on the readers of units: exact, spread over windows, and gone afterwards."""

from __future__ import annotations

import pytest
import timm
import torch
import torchvision
from conftest import make_swin, make_vit

import torch_dimap
from torch_dimap.learning import gated, straight_through

pytestmark = pytest.mark.usefixtures("one_thread")


def hooks(model):
    return [len(module._forward_pre_hooks) for module in model.modules()]


@pytest.mark.parametrize("make", [make_vit, make_swin])
def test_gates_of_zero_and_one_are_masks(make, images):
    model = make().eval()
    layers = [layer for layers in torch_dimap.group_units(model).values() for layer in layers]
    generator = torch.Generator().manual_seed(0)
    keeps = {x: torch.rand(x.units, generator=generator) < 0.6 for x in layers}
    with gated({x: keeps[x].float for x in layers}):
        shut = model(images)
    for layer, keep in keeps.items():
        weight = layer.read.tensor.data
        weight.mul_(layer.read.along(keep.float()))
    torch.testing.assert_close(model(images), shut, rtol=0, atol=2e-6)


@pytest.mark.parametrize("make", [make_vit, make_swin])
def test_a_row_gates_all_windows_of_its_image(make, images):
    model = make().eval()
    layers = [layer for layers in torch_dimap.group_units(model).values() for layer in layers]
    generator = torch.Generator().manual_seed(0)
    rows = {x: torch.rand(len(images), x.units, generator=generator) for x in layers}
    with gated({x: lambda x=x: rows[x] for x in layers}):
        together = model(images)
    for i in range(len(images)):
        with gated({x: lambda x=x: rows[x][i] for x in layers}):
            torch.testing.assert_close(model(images[i : i + 1]), together[i : i + 1],
                                       rtol=0, atol=2e-6)  # fmt: skip


@pytest.mark.parametrize("name", ["coatnet_0_rw_224", "nest_tiny"])
def test_gates_find_the_units_of_other_layouts(name):
    """Channels that come second, and heads that do not lie one after the other."""
    small = {"depths": (1, 1, 1, 1), "embed_dim": (16, 32, 32, 64)} if "coat" in name else {}
    model = timm.create_model(name, img_size=64, num_classes=10, **small).eval()
    units = torch_dimap.group_units(model)
    image = torch.randn(1, 3, 64, 64)
    for layer in (layers[-1] for layers in units.values()):
        keep = torch.arange(layer.units) % 2 == 0
        with gated({layer: keep.float}):
            shut = model(image)
        shape = [1, -1] + [1] * (layer.read.tensor.dim() - 2)
        layer.read.tensor.data.mul_(layer.read.along(keep.float()).view(shape))
        torch.testing.assert_close(model(image), shut, rtol=0, atol=2e-6)


@pytest.mark.parametrize("make", [make_vit, make_swin])
def test_gates_get_the_gradient_of_a_finite_difference(make, images):
    model = make().double().eval()
    layer = torch_dimap.group_units(model)["heads"][1]
    gates = torch.ones(layer.units, dtype=torch.float64, requires_grad=True)

    def loss():
        with gated({layer: lambda: gates}):
            return model(images.double()).square().sum()

    loss().backward()
    with torch.no_grad():
        gates[0] += 1e-6
        above = loss().item()
        gates[0] -= 2e-6
        below = loss().item()
    assert gates.grad[0].item() == pytest.approx((above - below) / 2e-6, rel=1e-5)


def test_hooks_are_gone_after_an_error(swin, images):
    before = hooks(swin)
    layers = torch_dimap.group_units(swin)["heads"]
    with pytest.raises(ZeroDivisionError):
        with gated({x: torch.ones(x.units).clone for x in layers}):
            assert hooks(swin) != before
            raise ZeroDivisionError
    assert hooks(swin) == before


def test_rows_that_fit_no_batch_are_refused(swin, images):
    layer = torch_dimap.group_units(swin)["neurons"][0]
    with pytest.raises(ValueError, match="found 3 rows in front of layers.0.blocks.0.mlp"):
        with gated({layer: lambda: torch.ones(3, layer.units)}):
            swin(images)


def test_readers_that_are_not_called_are_refused():
    model = torchvision.models.vit_b_16(num_classes=10)
    heads = torch_dimap.group_units(model)["heads"]
    before = hooks(model)
    with pytest.raises(ValueError, match="self_attention and 9 more: no hook runs there"):
        with gated({x: torch.ones(x.units).clone for x in heads}):
            pass
    assert hooks(model) == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_straight_through_is_exactly_the_hard_value(dtype):
    soft = torch.rand(1000, dtype=dtype, requires_grad=True)
    hard = straight_through(soft > 0.5, soft)
    assert hard.dtype == dtype
    assert torch.equal(hard, (soft > 0.5).to(dtype))
    weights = torch.arange(1000, dtype=dtype)
    (hard * weights).sum().backward()
    assert torch.equal(soft.grad, weights)


def test_straight_through_leaves_its_arguments_alone():
    hard, soft = torch.ones(2), torch.zeros(2, requires_grad=True)
    straight_through(hard, soft).mul_(3)
    assert hard.tolist() == [1, 1] and not hard.requires_grad


def test_gates_of_another_shape_are_refused_in_the_forward(images):
    model = make_vit().eval()
    layer = torch_dimap.group_units(model)["neurons"][0]
    for wrong in (torch.ones(1), torch.ones(()), torch.ones(4, 3)):  # one would scale all
        with gated({layer: lambda wrong=wrong: wrong}):
            with pytest.raises(ValueError, match=f"must have the shape \\({layer.units},\\)"):
                model(images)
    assert not any(hooks(model))


@pytest.mark.parametrize("gates", [None, [1], {"a": 2}])
def test_gates_of_what_is_no_layer_are_refused(gates):
    with pytest.raises(TypeError, match="gates must be a mapping unit layer"):
        with gated(gates):
            pass


def test_straight_through_of_two_shapes_is_refused():
    with pytest.raises(ValueError, match=r"one shape, found \(2,\) and \(3,\)"):
        straight_through(torch.ones(2), torch.ones(3))

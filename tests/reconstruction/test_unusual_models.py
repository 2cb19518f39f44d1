"""Models, batches and settings that are unlike those of image classifiers."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from conftest import make_vit
from torch import nn
from torch.nn.utils import prune

from torch_dimap import (
    global_module_aware_structured,
    global_module_aware_unstructured,
    group_parameters,
    group_units,
    reconstruct,
    remove_units,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def pruned(model):
    global_module_aware_unstructured(group_parameters(model), amount=0.5)
    return model


def batches_of(*sizes):
    generator = torch.Generator().manual_seed(1)
    return [torch.rand(n, 1, 16, 16, generator=generator) for n in sizes]


def assert_equal_models(one, other):
    for (name, a), b in zip(one.named_parameters(), other.parameters()):
        assert torch.equal(a, b), name


@pytest.fixture
def expected():
    """A ViT, reconstructed on usual batches."""
    model = pruned(make_vit())
    reconstruct(model, batches_of(4, 4))
    return model


class Normalizing(nn.Module):
    def __init__(self, in_place):
        super().__init__()
        self.model, self.in_place = make_vit(), in_place

    def forward(self, x):
        return self.model(x.sub_(0.5) if self.in_place else x - 0.5)


def test_a_model_may_change_its_input_in_place():
    batches, models = batches_of(4, 4), [pruned(Normalizing(x)) for x in (True, False)]
    for model in models:
        reconstruct(model, batches)
    assert_equal_models(*models)
    assert all(map(torch.equal, batches, batches_of(4, 4)))


@pytest.mark.parametrize("amount", [0.0, 0.5])
def test_hidden_float64_weights_stay_to_the_last_bit(amount):
    model = make_vit().double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 1e-3)  # no float32 any more
    global_module_aware_unstructured(group_parameters(model), amount=amount)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    reconstruct(model, [x.double() for x in batches_of(4)])
    for name, parameter in model.named_parameters():
        hidden = ~before.get(name.replace("_orig", "_mask"), torch.ones(()).bool()).bool()
        same = parameter == before[name]
        assert same.all() if amount == 0 else same[hidden.expand_as(same)].all(), name


def test_depthwise_convolutions_that_lose_whole_channels_are_left_alone(recwarn):
    torch.manual_seed(0)
    model = timm.create_model("pvt_v2_b0", num_classes=10).eval()
    global_module_aware_structured(group_units(model), 0.5)
    recwarn.clear()
    x = torch.randn(2, 3, 64, 64)
    misfits = reconstruct(model, [x])
    assert not recwarn.list and not any("dwconv" in name for name in misfits)
    masked = model(x)
    remove_units(model)
    torch.testing.assert_close(model(x), masked, rtol=1e-4, atol=1e-5)


def test_a_masked_kernel_is_named_and_left_alone_unless_it_is_asked_for():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 14 * 14, 3))
    for layer in (model[0], model[3]):
        prune.l1_unstructured(layer, "weight", 0.5)
    kernel = model[0].weight_orig.detach().clone()
    with pytest.warns(UserWarning, match="0.weight left alone"):
        assert list(reconstruct(model, batches_of(4))) == ["3.weight"]
    assert torch.equal(model[0].weight_orig, kernel)
    with pytest.raises(ValueError, match="another product with 0.weight"):
        reconstruct(model, batches_of(4), groups=[(model[0], "weight"), (model[3], "weight")])


class Box:
    def __init__(self, x):
        self.x = x


class Boxing(nn.Sequential):
    def forward(self, x):
        return Box(super().forward(x))


class OfBoxes(nn.Module):
    def __init__(self, in_place):
        super().__init__()
        torch.manual_seed(0)
        self.in_place = in_place
        self.blocks = nn.ModuleList(
            Boxing(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8), nn.Linear(8, 8)) for _ in range(4)
        )

    def forward(self, x):
        for block in self.blocks:
            y = block(x)
            if self.in_place:
                y.x += x
            x = y.x if self.in_place else y.x + x
        return x


def test_steps_may_give_objects_of_their_own_class():
    models = [OfBoxes(in_place) for in_place in (True, False)]
    x = torch.randn(20, 8, generator=torch.Generator().manual_seed(3))
    for model in models:
        for layer in [layer for layer in model.modules() if isinstance(layer, nn.Linear)]:
            prune.l1_unstructured(layer, "weight", 0.5)
        reconstruct(model, [x])
    assert_equal_models(*models)


class Frozen(nn.Module):
    def __init__(self, inference):
        super().__init__()
        torch.manual_seed(0)
        self.back, self.head, self.inference = make_vit(), nn.Linear(10, 5), inference

    def forward(self, x):
        with torch.inference_mode(self.inference):
            x = self.back(x)
        return self.head(x.clone())


def test_a_part_may_run_in_inference_mode():
    models = [pruned(Frozen(inference)) for inference in (True, False)]
    for model in models:
        reconstruct(model, batches_of(4))
    assert_equal_models(*models)


def test_weights_made_in_inference_mode_are_refused():
    with torch.inference_mode():
        model = nn.Sequential(nn.Linear(4, 4))
    prune.identity(model[0], "weight")
    with pytest.raises(ValueError, match="build the model outside of it"):
        reconstruct(model, [torch.rand(4, 4)])


class InPieces(nn.Module):
    """Runs its second layer on ten tokens at a time."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x):
        return self.c(torch.cat([self.b(part) for part in self.a(x).relu().split(10)]).relu())


class Choosing(InPieces):
    """Goes on with the tokens that are above a bound."""

    def forward(self, x):
        x = self.a(x)
        return self.c(self.b(x[x.sum(1) > 0]).relu())


def all_pruned(model):
    for layer in (model.a, model.b, model.c):
        prune.l1_unstructured(layer, "weight", 0.5)
    return model


@pytest.mark.parametrize(("sizes", "how"), [((10, 40), "more"), ((40, 10), "less")])
def test_batches_that_use_a_layer_more_or_less_often_are_refused(sizes, how):
    model = all_pruned(InPieces())
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match=f"b.weight must .* batch 1 to use it {how} often"):
        reconstruct(model, [torch.rand(n, 6) for n in sizes])
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


class Skipping(nn.Module):
    """Leaves out a module without weights for batches of another length."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8))
            for _ in range(4)
        )
        self.between = nn.ReLU()

    def forward(self, x):
        for i, block in enumerate(self.blocks):
            x = block(x)
            x = self.between(x) if i == 1 and len(x) == 10 else x
        return x


def test_batches_that_leave_out_a_module_are_refused():
    torch.manual_seed(0)
    model = Skipping()
    for layer in [layer for layer in model.modules() if isinstance(layer, nn.Linear)]:
        prune.l1_unstructured(layer, "weight", 0.5)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match="its ReLU with all batches, found batch 1 to leave it"):
        reconstruct(model, [torch.rand(n, 8) for n in (10, 12, 10)])
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_tokens_chosen_by_what_they_hold_need_each_layer_for_itself():
    torch.manual_seed(0)
    model, x = all_pruned(Choosing()), torch.randn(200, 6)
    with pytest.raises(RuntimeError, match="sequential=False"):
        reconstruct(model, [x])
    misfits = reconstruct(model, [x], sequential=False)
    assert all(misfit.after <= misfit.before for misfit in misfits.values())


class Scaled(nn.Module):
    """Adds its bias to a tenth of its product."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 8)

    def forward(self, x):
        product = nn.functional.linear(x, self.layer.weight)
        product *= 0.1
        product += self.layer.bias
        return product


def test_a_bias_that_is_added_to_more_than_the_product_stays():
    model = Scaled()
    prune.l1_unstructured(model.layer, "weight", 0.5)
    bias = model.layer.bias.detach().clone()
    reconstruct(model, [torch.rand(40, 6)])
    assert torch.equal(model.layer.bias, bias)


@pytest.mark.parametrize("others", [
    (torch.zeros(4).long(),), (torch.zeros(4).long(), torch.arange(4)), (["a.png"] * 4,),
])  # fmt: skip
def test_labels_of_all_kinds_are_left_out(expected, others):
    model = pruned(make_vit())  # whose forward takes masks for the attention besides
    reconstruct(model, [(x, *others) for x in batches_of(4, 4)])
    assert_equal_models(model, expected)


def test_what_may_be_no_label_is_left_out_with_a_warning(expected):
    model = pruned(make_vit())
    with pytest.warns(UserWarning, match="only the first entry of each batch"):
        reconstruct(model, [(x, torch.rand(4, 10)) for x in batches_of(4, 4)])
    assert_equal_models(model, expected)


def test_batches_without_images_tell_nothing(expected):
    model = pruned(make_vit())
    reconstruct(model, [torch.zeros(0, 1, 16, 16), *batches_of(4, 4), torch.zeros(0, 1, 16, 16)])
    assert_equal_models(model, expected)


def test_arrays_in_a_dict_are_refused():
    with pytest.raises(TypeError, match="must hold tensors, found ndarray"):
        reconstruct(pruned(make_vit()), [{"x": batches_of(4)[0].numpy()}])


def test_models_without_values_are_refused():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 4))
    prune.identity(model[0], "weight")
    with pytest.raises(ValueError, match="meta device and has no values"):
        reconstruct(model, [torch.rand(4, 4)])


def test_another_default_device_changes_nothing(expected):
    model, batches = pruned(make_vit()), batches_of(4, 4)
    with torch.device("meta"):
        reconstruct(model, batches)
    assert_equal_models(model, expected)


@pytest.mark.skipif(
    not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="torch before 2.9"
)
def test_the_later_settings_of_precision_may_be_in_use(expected, monkeypatch):
    def mixed():
        raise RuntimeError("you have used mix of the legacy and new APIs")

    monkeypatch.setattr(torch, "get_float32_matmul_precision", mixed)
    setting = torch.backends.cuda.matmul
    before = setting.fp32_precision
    try:
        setting.fp32_precision = "tf32"
        model = pruned(make_vit())
        reconstruct(model, batches_of(4, 4))
        assert setting.fp32_precision == "tf32"
    finally:
        setting.fp32_precision = before
    assert_equal_models(model, expected)


def test_little_damping_fits_no_rounding_of_sums():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 3, generator=generator) @ torch.randn(3, 30, generator=generator)
    x += 1e-3 * torch.randn(400, 30, generator=generator) + 10
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(30, 12))
    wanted = model(x).detach()
    prune.random_unstructured(model[0], "weight", 0.5)
    reconstruct(model, [x], damping=1e-9)
    assert (model(x) - wanted).norm() < 1e-3 * wanted.norm()
    assert model[0].weight_orig.abs().max() < 1

"""Layers that are wrapped, sharded, converted, recurrent or in inference mode."""

from __future__ import annotations

import warnings

import pytest
import torch
from backbones import build
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from torch_dimap import (
    dimap_unstructured,
    global_module_aware_unstructured,
    group_parameters,
    prune_to_flops,
    prune_to_parameters,
    remove_all,
    summarize,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def names_of(model: nn.Module) -> list[str]:
    """Return the names of the grouped layers."""
    found = {module: name for name, module in model.named_modules()}
    return [found[module] for pairs in group_parameters(model).values() for module, _ in pairs]


# --- readers, where the call has the model --------------------------------------------


def encoder() -> tuple[nn.Module, list]:
    """Return an encoder layer, whose attention reads the layer out_proj, and two pairs of it."""
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    return model, [(model.self_attn.out_proj, "weight"), (model.linear1, "weight")]


@pytest.mark.parametrize(
    "call",
    [
        lambda model, pairs: prune_to_parameters(model, 0.8, pairs),
        lambda model, pairs: prune_to_flops(model, torch.zeros(1, 3, 8), 0.8, pairs),
        lambda model, pairs: [
            summarize(model, parameters=pairs),
            global_module_aware_unstructured(pairs, amount=0.5),
        ],
    ],
)
def test_own_parameters_hold_in_readers_where_a_call_has_the_model(call):
    model, pairs = encoder()
    call(model, pairs)
    for _ in range(2):
        model(torch.randn(2, 3, 8)).sum().backward()
    assert model.self_attn.out_proj.weight_orig.grad is not None
    with torch.no_grad():
        model.self_attn.out_proj.weight_orig.mul_(2)
    x = torch.randn(2, 3, 8)
    before = model(x)
    assert torch.equal(remove_all(model)(x), before)


# --- wrappers -------------------------------------------------------------------------


def test_group_parameters_finds_the_layers_inside_lora(swin, images):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["qkv", "fc1"], init_lora_weights=False)
    dense = names_of(swin)
    model = peft.get_peft_model(swin, config)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        groups = group_parameters(model)
        found = [name.removeprefix("base_model.model.") for name in names_of(model)]
    assert [name.removesuffix(".base_layer") for name in found] == dense
    global_module_aware_unstructured(groups, amount=0.5)
    model.eval()(images).sum().backward()
    before = model(images)
    merged = remove_all(model).merge_and_unload()  # in this order: the merge knows no masks
    torch.testing.assert_close(merged(images), before)


def test_group_parameters_finds_the_layers_inside_compiled_and_checkpointed_parts(swin):
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    dense = names_of(swin)
    block = swin.layers[0].blocks[0]
    block.attn = torch.compile(block.attn)
    block.mlp.fc1 = checkpoint_wrapper(block.mlp.fc1)
    found = [
        name.replace("._orig_mod", "").replace("._checkpoint_wrapped_module", "")
        for name in names_of(swin)
    ]
    assert found == dense


class Scaled(nn.Module):
    """A wrapper that nobody knows."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.inner = layer

    def forward(self, x):
        return 2 * self.inner(x)


def unknown_wrapper(layer):
    return Scaled(layer)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated:FutureWarning")
@pytest.mark.parametrize(
    ("wrap", "place"),
    [
        (unknown_wrapper, "qkv.inner.weight"),
        (parametrizations.weight_norm, "qkv.weight"),
        (nn.utils.weight_norm, "qkv.weight"),
        (nn.utils.spectral_norm, "qkv.weight"),
    ],
)
def test_group_parameters_warns_of_a_layer_hidden_by_a_wrapper(swin, wrap, place):
    attention = swin.layers[0].blocks[0].attn
    attention.qkv = wrap(attention.qkv)
    with pytest.warns(UserWarning, match=rf"layers.0.blocks.0.attn.{place} would be in") as caught:
        groups = group_parameters(swin)
    assert caught[0].filename == __file__
    assert {group: len(pairs) for group, pairs in groups.items()} == {"qkv": 3, "proj": 4, "mlp": 8}


def test_group_parameters_is_silent_about_adapters_beside_a_layer(swin):
    attention = swin.layers[0].blocks[0].attn
    attention.qkv = nn.ModuleDict({"linear": attention.qkv, "lora_a": nn.Linear(16, 2)})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(group_parameters(swin)["qkv"]) == 4


# --- what takes no mask ---------------------------------------------------------------


def legacy(norm):
    return norm(nn.Linear(8, 6))


def sparse():
    layer = nn.Linear(8, 6)
    layer.weight = nn.Parameter(layer.weight.detach().to_sparse())
    return layer


def scripted():
    return torch.jit.script(nn.Linear(8, 6))


def quantized():
    model = nn.Sequential(nn.Linear(8, 6))
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear})[0]


def by_torchao():
    torchao = pytest.importorskip("torchao.quantization")
    model = nn.Sequential(nn.Linear(64, 64))
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    return model[0]


UNFIT = [
    (lambda: legacy(nn.utils.spectral_norm), "by spectral_norm.*torch.nn.utils.remove_spectral"),
    (lambda: legacy(nn.utils.weight_norm), "computed by weight_norm.*utils.remove_weight_norm"),
    (sparse, "must be a dense tensor, found the layout torch.sparse_coo: make it"),
    (scripted, "part of a scripted module, which takes no masks: prune the model and bake"),
    (quantized, "packed by quantization, which takes no masks: prune the model and bake"),
    (by_torchao, "must be stored as plain numbers, found Int8Tensor: prune the model and bake"),
]


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::UserWarning:torch")
@pytest.mark.parametrize(("make", "message"), UNFIT)
def test_layers_that_take_no_mask_are_refused_for_what_they_are(make, message):
    model = nn.Sequential(make())
    with pytest.raises(ValueError, match=message):
        dimap_unstructured(model[0], "weight", amount=0.5)
    with pytest.raises(ValueError, match=rf"summarize\(\): 0.weight .*{message}"):
        summarize(model, parameters=[(model[0], "weight")])


# --- recurrent layers -----------------------------------------------------------------


def test_masks_hold_in_an_lstm():
    torch.manual_seed(0)
    model, dense = nn.LSTM(4, 5), nn.LSTM(4, 5)
    order = list(model._parameters)
    dimap_unstructured(model, "weight_hh_l0", amount=0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = torch.randn(3, 2, 4)
    for _ in range(2):
        model(x)[0].sum().backward()
        optimizer.step()
    state = dict(model.state_dict())
    state["weight_hh_l0"] = state.pop("weight_hh_l0_orig") * state.pop("weight_hh_l0_mask")
    dense.load_state_dict(state)
    assert torch.equal(model(x)[0], dense(x)[0])
    remove_all(model)
    assert torch.equal(model(x)[0], dense(x)[0]) and list(model._parameters) == order


def test_a_failure_half_way_puts_an_lstm_back(monkeypatch):
    torch.manual_seed(0)
    model = nn.LSTM(4, 5)
    x = torch.randn(3, 2, 4)
    before, flat = model(x)[0], list(model._flat_weights)

    def interrupted(hook):
        raise KeyboardInterrupt

    monkeypatch.setattr(model, "register_forward_pre_hook", interrupted, raising=False)
    with pytest.raises(KeyboardInterrupt):
        dimap_unstructured(model, "weight_hh_l0", amount=0.5)
    assert all(a is b for a, b in zip(model._flat_weights, flat, strict=True))
    assert torch.equal(model(x)[0], before)


# --- inference mode -------------------------------------------------------------------


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_masks_made_in_inference_mode_can_be_changed_and_trained(layout):
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3)).to(memory_format=layout)
    with torch.inference_mode():
        global_module_aware_unstructured([(layer, "weight") for layer in model], amount=0.5)
    model.load_state_dict(model.state_dict())
    model(torch.randn(1, 4, 6, 6)).sum().backward()
    with torch.inference_mode():
        remove_all(model)
    with torch.no_grad():
        model[0].weight.mul_(2)
    model(torch.randn(1, 4, 6, 6)).sum().backward()


# --- tools that know nothing of masks: what docs/backbones.md says of each ---------------


def test_parametrizations_and_masks_exclude_each_other():
    layer = nn.Linear(8, 6)
    dimap_unstructured(layer, "weight", amount=0.5)
    with pytest.raises(ValueError, match="weight"):
        parametrize.register_parametrization(layer, "weight", nn.Identity())


@pytest.mark.parametrize("bake", [False, True])
def test_merging_lora_works_into_baked_layers_only(swin, images, bake):
    peft = pytest.importorskip("peft")
    global_module_aware_unstructured(group_parameters(swin), amount=0.5)
    if bake:
        remove_all(swin)
    config = peft.LoraConfig(r=2, target_modules=["qkv"], init_lora_weights=False)
    model = peft.get_peft_model(swin, config).eval()
    before = model(images)
    merged = model.merge_and_unload()
    assert torch.allclose(merged(images), before, atol=1e-5) is bake


def test_fusing_a_masked_convolution_fails_and_a_baked_one_works():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).eval()
    nn.init.uniform_(model[1].running_mean)
    dimap_unstructured(model[0], "weight", amount=0.5)
    x = torch.randn(1, 3, 2, 2)
    expected = model(x)
    with pytest.raises(TypeError, match="as parameter 'weight'"), torch.no_grad():
        model(x)
        nn.utils.fusion.fuse_conv_bn_eval(model[0], model[1])(x)
    fused = nn.utils.fusion.fuse_conv_bn_eval(remove_all(model)[0], model[1])
    torch.testing.assert_close(fused(x), expected)


def to_int8(model):
    torchao = pytest.importorskip("torchao.quantization")
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    return model


def dynamically(model):
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear})


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore::UserWarning:torch")
@pytest.mark.parametrize("quantize", [to_int8, dynamically])
def test_quantizing_fails_on_masked_layers_and_works_on_baked_ones(quantize):
    torch.manual_seed(0)
    masked, baked = nn.Sequential(nn.Linear(64, 64)), nn.Sequential(nn.Linear(64, 64))
    for model in (masked, baked):
        dimap_unstructured(model[0], "weight", amount=0.5)
    x = torch.randn(2, 64)
    expected = remove_all(baked)(x)
    torch.testing.assert_close(quantize(baked)(x), expected, atol=0.1, rtol=0.1)
    with pytest.raises((TypeError, AttributeError)):
        quantize(masked)(x)


def test_from_pretrained_fills_masked_layers_anew_and_loads_baked_ones(tmp_path):
    pytest.importorskip("transformers")
    model = build("transformers ViTModel")
    groups = group_parameters(model)
    global_module_aware_unstructured(groups, amount=0.5)
    model.save_pretrained(tmp_path / "masked")
    remove_all(model).save_pretrained(tmp_path / "baked")
    wrong, right = (type(model).from_pretrained(tmp_path / x) for x in ("masked", "baked"))
    for layers in (wrong, right):
        same = [
            torch.equal(module.weight, twin.weight)
            for group, pairs in group_parameters(layers).items()
            for (module, _), (twin, _) in zip(pairs, groups[group], strict=True)
        ]
        assert all(same) if layers is right else not any(same)

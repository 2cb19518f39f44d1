"""Attentions replaced: what is computed, what is refused, what is kept."""

import copy
import pickle

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import ParallelThingsBlock
from torch import nn

from torch_dimap import learning
from torch_dimap.operations import head_shares, mix_heads
from torch_dimap.operations.modules import PlainConvolution, SharedConvolution

SIZE = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 4,
        "num_classes": 5}  # fmt: skip


def small_vit(**more):
    return timm.create_model("vit_tiny_patch16_224", **{**SIZE, **more})


def small_swin(**more):
    return timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=32, patch_size=4, window_size=4, embed_dim=24,
        depths=(2, 2), num_heads=(2, 4), num_classes=5, **more,
    )  # fmt: skip


MODELS = {
    "vit": (small_vit, "blocks.{}.attn"),
    "deit": (
        lambda: timm.create_model("deit_tiny_distilled_patch16_224", **SIZE), "blocks.{}.attn"
    ),
    "no class token": (
        lambda: small_vit(class_token=False, global_pool="avg"), "blocks.{}.attn"
    ),
    "swin": (small_swin, "layers.0.blocks.{}.attn"),
}  # fmt: skip
IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def scrambled(model):
    """Give everything that is trained a value of its own, batch norms too."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                noise = torch.randn(tensor.shape, generator=generator) * 0.3
                tensor.copy_(noise.abs() + 0.5 if "running_var" in name else tensor + noise)
    return model


def by_shifting(x, value, value_bias, projection, proj_bias, shares, norm):
    """The definition: each tap's mixed heads on the shifted map, added up."""
    heads, taps = shares.shape
    width = len(value) // heads
    size = 3 if taps == 9 else 1
    padded = F.pad(x, (0, 0, *[size // 2] * 4))
    total, out = 0, 0
    for tap in range(taps):
        row, col = divmod(tap, size)
        shifted = padded[:, row : row + x.shape[1], col : col + x.shape[2]]
        v = sum(shares[h, tap] * value[h * width : (h + 1) * width] for h in range(heads))
        total = total + shifted @ v.T
        total = total + sum(
            shares[h, tap] * value_bias[h * width : (h + 1) * width] for h in range(heads)
        )
        out = out + sum(
            shares[h, tap] * projection[:, h * width : (h + 1) * width] for h in range(heads)
        )
    z = F.relu(norm(total.permute(0, 3, 1, 2))).permute(0, 2, 3, 1)
    return z @ out.T + proj_bias


@pytest.mark.parametrize("taps", [1, 9])
def test_mixed_heads_give_what_shifted_taps_give(taps):
    torch.manual_seed(taps)
    site = small_vit().blocks[0].attn
    norm = nn.BatchNorm2d(6).eval()
    norm.running_mean.normal_()
    shares = head_shares(torch.randn(4, taps), 0.7)
    x = torch.randn(2, 4, 5, 24)
    value, bias = site.qkv.weight[-24:], torch.randn(24)
    made = mix_heads(value, bias, site.proj.weight, shares)
    z = F.conv2d(x.permute(0, 3, 1, 2), made.kernel, made.bias, padding=taps // 9)
    ours = F.relu(norm(z)).permute(0, 2, 3, 1) @ made.projection.T + site.proj.bias
    slow = by_shifting(x, value, bias, site.proj.weight, site.proj.bias, shares, norm)
    torch.testing.assert_close(ours, slow, atol=1e-5, rtol=1e-5)


def test_shares_are_alike_at_first_and_pick_a_head_when_cold():
    assert head_shares(torch.ones(4, 9), 1e-2).unique().tolist() == [0.25]
    logits = torch.ones(4, 9)
    logits[2] += 0.1
    assert (head_shares(logits, 1e-2)[2] > 0.99).all()
    assert (head_shares(logits, 1e2)[2] < 0.26).all()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("operation", ["conv1", "conv3"])
def test_collapsed_convolutions_give_the_same_outputs(name, operation):
    build, place = MODELS[name]
    model = learning.replace_attentions(build(), {place.format(i): operation for i in (0, 1)})
    scrambled(model).eval()
    before = model(IMAGES)
    shared = [x for x in model.modules() if isinstance(x, SharedConvolution)]
    learning.collapse_convolutions(model)
    assert len(shared) == 2
    assert not any(isinstance(x, SharedConvolution) for x in model.modules())
    torch.testing.assert_close(model(IMAGES), before, atol=1e-5, rtol=1e-5)


def test_a_swin_convolution_sees_over_the_edges_of_windows():
    model = learning.replace_attentions(small_swin(), {"layers.0.blocks.1.attn": "conv3"}).eval()
    block = model.layers[0].blocks[1]
    x = torch.zeros(1, 8, 8, 24)
    before = block._attn(x)
    x[0, 3, 3] = 1.0  # the corner of the first of four windows
    changed = (block._attn(x) - before).abs().sum(-1)[0] > 0
    expected = torch.zeros(8, 8, dtype=torch.bool)
    expected[2:5, 2:5] = True
    assert not (changed & ~expected).any()
    assert changed[4, 4]


@pytest.mark.parametrize("name", MODELS)
def test_skipped_attentions_give_nothing_or_their_input(name):
    build, place = MODELS[name]
    for skip in ("zero", "norm"):
        model = build().eval()
        block = model.get_submodule(place.format(0).removesuffix(".attn"))
        given = []
        learning.replace_attentions(model, {place.format(0): "skip"}, skip=skip)
        block.attn.register_forward_hook(lambda m, x, y, given=given: given.append((x[0], y)))
        model(IMAGES)
        (x, y), = given
        assert torch.equal(y, torch.zeros_like(x) if skip == "zero" else x)


def test_prefix_tokens_pass_a_convolution_unchanged():
    model = learning.replace_attentions(small_vit(reg_tokens=2), {"blocks.0.attn": "conv3"}).eval()
    x = torch.randn(2, 3 + 16, 24)
    assert torch.equal(model.blocks[0].attn(x)[:, :3], x[:, :3])


def test_a_convolution_trains_and_survives_copies_and_pickles():
    for build, place in (MODELS["vit"], MODELS["swin"]):
        model = learning.replace_attentions(build(), {place.format(0): "conv3",
                                                      place.format(1): "skip"})  # fmt: skip
        model(IMAGES).sum().backward()
        learned = [p for n, p in model.named_parameters() if place.format(0) in n]
        assert all(p.grad is not None for p in learned)
        model.eval()
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(twin(IMAGES), model(IMAGES))


def test_convolutions_compile_whole():
    model = learning.replace_attentions(small_vit(), {"blocks.0.attn": "conv3"}).eval()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(IMAGES), model(IMAGES), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("operations, more, error", [
    ({"blocks.9.attn": "skip"}, {}, "must name attentions of the model, blocks.0.attn"),
    ({"blocks.0.attn": "conv5"}, {}, "must be one of attention, conv3, conv1, skip"),
    ({"blocks.0.attn": "skip"}, {"skip": "no"}, "skip must be one of zero, norm"),
    ({"blocks.0.attn": "conv3"}, {"temperature": 0.0}, "temperature must be greater than 0"),
])  # fmt: skip
def test_wrong_arguments_are_refused(operations, more, error):
    with pytest.raises(ValueError, match=error):
        learning.replace_attentions(small_vit(), operations, **more)
    with pytest.raises(TypeError, match="must be a mapping"):
        learning.replace_attentions(small_vit(), ["blocks.0.attn"])


@pytest.mark.parametrize("build, error", [
    (lambda: timm.create_model("swinv2_cr_tiny_224"), "one of timm's ViTs"),
    (lambda: nn.Sequential(small_vit()), "without wrappers"),
    (lambda: small_vit(scale_attn_norm=True, qk_norm=True), "Attention and its norm"),
    (lambda: small_vit(attn_layer="diff"), "DiffAttention"),
    (lambda: small_vit(block_fn=ParallelThingsBlock), "ParallelThingsBlock"),
])  # fmt: skip
def test_other_attentions_are_refused_by_name(build, error):
    with pytest.raises(ValueError, match=error):
        learning.replace_attentions(build(), {})


def test_a_second_operation_in_the_same_place_is_refused():
    model = learning.replace_attentions(small_vit(), {"blocks.0.attn": "conv1"})
    learning.replace_attentions(model, {"blocks.0.attn": "conv1", "blocks.1.attn": "skip"})
    before = model.state_dict().keys()
    with pytest.raises(ValueError, match="replaced before"):
        learning.replace_attentions(model, {"blocks.2.attn": "skip", "blocks.0.attn": "skip"})
    assert model.state_dict().keys() == before


def test_masks_are_refused_before_and_held_after():
    model = small_vit()
    nn.utils.prune.l1_unstructured(model.blocks[0].attn.qkv, "weight", 0.5)
    with pytest.raises(RuntimeError, match="remove_all"):
        learning.replace_attentions(model, {"blocks.0.attn": "conv3"})
    model = learning.replace_attentions(small_vit(), {"blocks.0.attn": "conv3"}).eval()
    learning.collapse_convolutions(model)
    conv = next(x for x in model.modules() if isinstance(x, PlainConvolution)).conv
    nn.utils.prune.l1_unstructured(conv, "weight", 0.5)
    masked = model(IMAGES)
    nn.utils.prune.remove(conv, "weight")
    assert torch.equal(model(IMAGES), masked)


def test_maps_of_another_size_and_attention_masks_are_refused():
    model = learning.replace_attentions(small_vit(), {"blocks.0.attn": "conv3"})
    with pytest.raises(ValueError, match="expected 4 x 4 tokens besides 1 others, found 36"):
        model.blocks[0].attn(torch.zeros(1, 37, 24))
    with pytest.raises(ValueError, match="takes no attention mask"):
        model.blocks[0].attn(torch.zeros(1, 17, 24), attn_mask=torch.ones(17, 17))


@pytest.mark.parametrize("more", [{"dynamic_img_size": True}, {"patch_drop_rate": 0.5}])
def test_models_whose_map_of_patches_changes_are_refused(more):
    with pytest.raises(ValueError, match="always given the same map of patches"):
        learning.replace_attentions(small_vit(**more), {"blocks.0.attn": "conv3"})


def test_a_swin_with_convolutions_takes_another_size_of_images():
    model = learning.replace_attentions(small_swin(), {"layers.0.blocks.1.attn": "conv3"}).eval()
    model.set_input_size(img_size=(64, 64))
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 5)


def test_collapsing_minds_only_masks_on_what_it_collapses():
    model = learning.replace_attentions(small_vit(), {"blocks.0.attn": "conv3"})
    nn.utils.prune.l1_unstructured(model.blocks[1].attn.qkv, "weight", 0.5)
    nn.utils.prune.l1_unstructured(model.blocks[0].attn.proj, "weight", 0.5)
    with pytest.raises(RuntimeError, match="blocks.0.attn.proj.weight"):
        learning.collapse_convolutions(model)
    nn.utils.prune.remove(model.blocks[0].attn.proj, "weight")
    assert learning.collapse_convolutions(model).blocks[0].attn.operation == "conv3"

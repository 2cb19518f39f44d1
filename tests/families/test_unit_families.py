"""Every family: units of uneven numbers leave, and the outputs stay what they were."""

from __future__ import annotations

import warnings
from functools import partial
from operator import is_

import backbones
import pytest
import timm
import torch
from timm.models.focalnet import FocalNet
from timm.models.hieradet_sam2 import HieraDet
from timm.models.maxxvit import MaxxVit, MaxxVitCfg, MaxxVitTransformerCfg
from timm.models.mlp_mixer import MlpMixer
from torch import nn
from torch.nn.utils import prune

from torch_dimap import global_module_aware_structured, group_units, remove_units
from torch_dimap.units import cut_units, describe_units


def maxvit(**transformer: object) -> nn.Module:
    cfg = MaxxVitTransformerCfg(dim_head=8, **transformer)
    blocks = dict(block_type=("M", "T"), stem_width=16, transformer_cfg=cfg)
    return MaxxVit(MaxxVitCfg((16, 32), (1, 1), **blocks), img_size=64, num_classes=10)


small = partial(timm.create_model, num_classes=10)
vit = partial(small, img_size=32, embed_dim=24, depth=2)
hf = dict(image_size=32, hidden_size=24, intermediate_size=48, num_attention_heads=3)
hf |= dict(num_hidden_layers=2, patch_size=8)
hf_pyramid = dict(depths=[1, 1, 1, 1], hidden_sizes=[8, 16, 16, 32], image_size=64)
hf_pyramid |= dict(num_encoder_blocks=4, num_attention_heads=[1, 2, 2, 4])

# family -> what builds it, size of its input; beside those in backbones.py.
MORE = {
    "maxvit, head first": (partial(maxvit, head_first=True), 64),
    "maxvit, bias_tf": (partial(maxvit, head_first=False, rel_pos_type="bias_tf"), 64),
    "maxvit, mlp": (partial(maxvit, rel_pos_type="mlp"), 64),
    "maxvit, nchw": (partial(maxvit, use_nchw_attn=True), 64),
    "vit, qk norm and gate": (partial(vit, "vit_tiny_patch16_224", qk_norm=True, num_heads=3), 32),
    "vit relpos": (partial(vit, "vit_relpos_small_patch16_224", num_heads=3), 32),
    "vit rope": (partial(vit, "vit_small_patch16_rope_224", num_heads=3), 32),
    "dinov3": (partial(vit, "vit_small_patch16_dinov3", num_heads=3), 32),
    "eva giant": (partial(vit, "eva_giant_patch14_224", img_size=28, num_heads=3), 28),
    "sam": (partial(vit, "samvit_base_patch16", num_heads=3), 32),
    "sam2": (
        partial(HieraDet, embed_dim=16, num_heads=2, stages=(1, 1, 1, 1), global_att_blocks=(),
                window_spec=(2, 2, 2, 2), num_classes=10),
        64,
    ),
    "tiny_vit": (
        partial(small, "tiny_vit_5m_224", embed_dims=(8, 16, 16, 32), depths=(1, 1, 1, 1),
                num_heads=(1, 2, 2, 4)),
        224,
    ),
    "tnt": (partial(vit, "tnt_s_patch16_224", num_heads_outer=3), 32),
    "visformer": (
        partial(small, "visformer_tiny", img_size=64, embed_dim=48, depth=(1, 1, 1), num_heads=2),
        64,
    ),
    "edgenext": (partial(small, "edgenext_xx_small"), 64),
    "davit": (
        partial(small, "davit_tiny", embed_dims=(8, 16), depths=(1, 1), num_heads=(2, 4)), 64,
    ),
    "convnext": (partial(small, "convnext_atto", dims=(8, 8, 8, 8), depths=(1, 1, 1, 1)), 64),
    "convnext, conv mlp": (
        partial(small, "convnext_atto", conv_mlp=True, dims=(8, 8, 8, 8), depths=(1, 1, 1, 1)), 64,
    ),
    "efficientformer_v2": (
        partial(small, "efficientformerv2_s0", embed_dims=(8, 8, 16, 16), depths=(1, 1, 1, 1)), 224,
    ),
    "efficientvit_msra": (partial(small, "efficientvit_m0"), 224),
    "fasternet": (partial(small, "fasternet_t0"), 64),
    "fastvit": (partial(small, "fastvit_t8"), 64),
    "inception_next": (partial(small, "inception_next_atto"), 64),
    "repvit": (partial(small, "repvit_m1"), 64),
    "shvit": (partial(small, "shvit_s1"), 64),
    "focalnet": (partial(FocalNet, num_classes=10, embed_dim=16, depths=(1, 1, 1, 1)), 64),
    "sequencer": (partial(small, "sequencer2d_s", img_size=56, layers=(1, 1, 1, 1)), 56),
    "mixer": (partial(MlpMixer, 10, 64, num_blocks=2, embed_dim=16), 64),
    "transformers DeiTModel": (partial(backbones.transformers, "DeiTModel", **hf), 32),
    "transformers BeitModel": (
        partial(backbones.transformers, "BeitModel", use_relative_position_bias=True, **hf), 32,
    ),
    "transformers Dinov2Model": (partial(backbones.transformers, "Dinov2Model", **hf), 32),
    "transformers SiglipVisionModel": (
        partial(backbones.transformers, "SiglipVisionModel", **hf), 32,
    ),
    "transformers SegformerModel": (
        partial(backbones.transformers, "SegformerModel", **hf_pyramid), 64,
    ),
    "transformers PvtModel": (partial(backbones.transformers, "PvtModel", **hf_pyramid), 64),
    "transformers CvtModel": (
        partial(backbones.transformers, "CvtModel", embed_dim=[8, 16, 32], num_heads=[1, 2, 4]),
        64,
    ),
    "transformers HieraModel": (
        partial(backbones.transformers, "HieraModel", embed_dim=16, image_size=[64, 64],
                depths=[1, 1, 1, 1]),
        64,
    ),
}  # fmt: skip
ALL = {**backbones.FAMILIES, **MORE}
# Those whose attentions expect as many channels inside as outside.
REPLACED = [
    "swinv2", "swinv2_cr", "pvt_v2", "twins", "nest", "xcit", "cait", "convit", "crossvit", "volo",
    "beit", "eva02", "torchvision swin", "torchvision swin_v2", "torchvision vit",
    "transformers PvtV2Model", "vit relpos", "dinov3", "eva giant", "edgenext", "davit",
]  # fmt: skip
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(params=ALL)
def family(request, monkeypatch):
    if request.param.startswith("transformers"):
        pytest.importorskip("transformers")
    monkeypatch.setattr(backbones, "FAMILIES", ALL)
    return request.param


def make(family):
    """Build a model whose weights no initialisation makes alike, in double precision."""
    model = backbones.build(family).double().eval()
    for p in model.parameters():
        p.data += 0.05 * torch.randn_like(p)
    return model


def units_of(model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # what a family keeps is tested elsewhere
        return group_units(model)


def mask_unevenly(model, amount, seed):
    generator = torch.Generator().manual_seed(seed)
    units = units_of(model)
    scores = {
        layer: torch.rand(layer.units, generator=generator)
        * torch.rand((), generator=generator)
        for layers in units.values()
        for layer in layers
    }
    possible = {
        kind: int(amount * sum(layer.units - 1 for layer in layers))
        for kind, layers in units.items()
    }
    return global_module_aware_structured(
        units, possible, scores, multiple=1, pruning_method=prune.L1Unstructured
    )


def test_remove_units_keeps_the_outputs_of_the_family(family):
    model, x = make(family), backbones.images(family).double()
    heads = units_of(model).get("heads", ())
    assert any(layer.forward for layer in heads) == (family in REPLACED)
    for seed in range(2):
        done = mask_unevenly(model, 0.5, seed)
        assert any(cut.pruned for cut in done.values())
        expected = backbones.outputs(model, x)
        before = sum(p.numel() for p in model.parameters())
        remove_units(model)
        assert not prune.is_pruned(model)
        assert sum(p.numel() for p in model.parameters()) < before
        found = backbones.outputs(model, x)
        assert (found - expected).abs().max() <= 1e-12 * expected.abs().max()
        described = {(x.name, kind): x.units for kind, xs in units_of(model).items() for x in xs}
        assert described == {
            (name, kind): units for kind, cut in done.items() for name, units in cut.kept.items()
        }


@pytest.mark.parametrize("family", ["swin", "swinv2", "coatnet", "mvitv2", "pvt_v2"], indirect=True)
def test_a_layer_may_lose_all_units_or_keeps_the_one_that_it_needs(family):
    model, x = make(family), backbones.images(family).double()
    units = units_of(model)
    global_module_aware_structured(units, 1.0, minimum=0)
    expected = backbones.outputs(model, x)
    remove_units(model)
    found = backbones.outputs(model, x)
    assert (found - expected).abs().max() <= 1e-12 * expected.abs().max()
    needed = {layer.name for layer in units["heads"] if layer.empty is None}
    left = [layer for layer in describe_units(model, None, "test") if not layer.obstacle]
    assert {layer.name for layer in left if layer.kind == "heads"} == needed
    parameters = list(model.parameters())
    remove_units(model)  # an optimizer made in between still trains them
    assert all(map(is_, model.parameters(), parameters))


def test_a_slim_model_of_the_family_trains(family):
    model, x = make(family).float(), backbones.images(family)
    mask_unevenly(model, 0.5, 0)
    expected = backbones.outputs(model, x)
    remove_units(model)
    found = backbones.outputs(model, x)
    assert (found - expected).abs().max() <= 2e-6 * expected.abs().max()
    backbones.outputs(model.train(), x).square().mean().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("family", REPLACED, indirect=True)
def test_a_replaced_forward_computes_what_the_original_does(family):
    model, x = make(family), backbones.images(family).double()
    layers = [x for x in units_of(model)["heads"] if x.forward]
    for training in (False, True):
        model.train(training)
        before = {name: buffer.clone() for name, buffer in model.named_buffers()}
        expected = backbones.outputs(model, x)
        for name, buffer in model.named_buffers():
            if buffer.shape == before[name].shape:  # statistics of batch norms
                buffer.copy_(before[name])
        kinds = [type(layer.module) for layer in layers]
        cut_units({layer: torch.ones(layer.units, dtype=torch.bool) for layer in layers})
        torch.testing.assert_close(backbones.outputs(model, x), expected, rtol=1e-10, atol=1e-10)
        for layer, kind in zip(layers, kinds):
            layer.module.__class__ = kind

"""One small model of every family, with weights: what the tests of behaviour run on."""

from __future__ import annotations

from functools import partial

import timm
import torch
import torchvision
from timm.models.crossvit import CrossVit
from timm.models.levit import Levit
from timm.models.maxxvit import MaxxVit, MaxxVitCfg
from timm.models.mvitv2 import MultiScaleVit, MultiScaleVitCfg
from timm.models.nest import Nest
from timm.models.volo import VOLO
from torch import nn
from torchvision.models import swin_transformer as tv_swin

CLASSES = 10


def transformers(name: str, **kwargs: object) -> nn.Module:
    """Build a model of Hugging Face transformers, which is imported only now."""
    import transformers

    model_class = getattr(transformers, name)
    return model_class(model_class.config_class(**kwargs))


small = partial(timm.create_model, num_classes=CLASSES)
swin = partial(small, img_size=32, window_size=4, embed_dim=16, depths=(2, 1), num_heads=(2, 4))
vit = partial(small, img_size=32, embed_dim=24, depth=2)
pyramid = dict(depths=(1, 1, 2, 1), embed_dims=(8, 16, 16, 32), num_heads=(1, 2, 2, 4))
tv = dict(patch_size=[4, 4], embed_dim=16, depths=[2, 1], num_heads=[2, 4], window_size=[4, 4])
hf_swin = dict(image_size=32, window_size=4, embed_dim=16, depths=[2, 1], num_heads=[2, 4])
hf_vit = dict(image_size=32, hidden_size=24, intermediate_size=48, num_attention_heads=3)

# family -> what builds it, size of its input
FAMILIES = {
    "swin": (partial(swin, "swin_tiny_patch4_window7_224"), 32),
    "swin_s3": (partial(swin, "swin_s3_tiny_224", window_size=(4, 2)), 32),
    "swinv2": (partial(swin, "swinv2_tiny_window8_256"), 32),
    "swinv2_cr": (partial(swin, "swinv2_cr_tiny_ns_224"), 32),
    "pvt_v2": (partial(small, "pvt_v2_b0", **pyramid), 32),
    "twins": (partial(small, "twins_svt_small", **pyramid), 64),
    "mvitv2": (
        partial(MultiScaleVit, MultiScaleVitCfg(depths=(1, 1, 1, 1), embed_dim=16), (32, 32)),
        32,
    ),
    "hiera": (
        partial(small, "hiera_tiny_224", img_size=(64, 64), stages=(1, 1, 1, 1), embed_dim=16),
        64,
    ),
    "maxvit": (
        partial(MaxxVit, MaxxVitCfg((32, 64), (1, 1), ("M", "M"), stem_width=16), img_size=64),
        64,
    ),
    "coatnet": (
        partial(MaxxVit, MaxxVitCfg((16, 32), (1, 2), ("C", "T"), stem_width=16), img_size=64),
        64,
    ),
    "mobilevit": (partial(small, "mobilevit_xxs"), 64),
    "mobilevitv2": (partial(small, "mobilevitv2_050"), 64),
    "levit": (
        partial(Levit, 64, embed_dim=(16, 32), key_dim=8, depth=(1, 1), num_heads=(2, 4)),
        64,
    ),
    "nest": (
        partial(Nest, 64, embed_dims=(16, 32, 64), num_heads=(1, 2, 4), depths=(1, 1, 1)),
        64,
    ),
    "pit": (
        partial(small, "pit_ti_224", img_size=64, depth=[1, 1, 1], base_dims=[8, 8, 8]),
        64,
    ),
    "xcit": (partial(vit, "xcit_nano_12_p16_224", embed_dim=32), 32),
    "cait": (partial(vit, "cait_xxs24_224", embed_dim=32), 32),
    "convit": (partial(vit, "convit_tiny", embed_dim=8, local_up_to_layer=1), 32),
    "crossvit": (
        partial(
            CrossVit,
            img_size=48,
            img_scale=(1.0, 2 / 3),
            embed_dim=(8, 16),
            depth=((1, 1, 0),),
            num_heads=(2, 2),
        ),
        48,
    ),
    "volo": (
        partial(
            VOLO,
            (1, 1, 1, 1),
            img_size=32,
            embed_dims=(16, 32, 32, 32),
            num_heads=(1, 2, 2, 2),
        ),
        32,
    ),
    "efficientformer": (partial(small, "efficientformer_l1", embed_dims=(8, 16, 32, 64)), 224),
    "vit": (partial(vit, "vit_tiny_patch16_224"), 32),
    "deit": (partial(vit, "deit_tiny_distilled_patch16_224"), 32),
    "deit3": (partial(vit, "deit3_small_patch16_224"), 32),
    "beit": (partial(vit, "beit_base_patch16_224"), 32),
    "eva02": (partial(vit, "eva02_tiny_patch14_224", img_size=28), 28),
    "torchvision swin": (partial(tv_swin.SwinTransformer, **tv), 32),
    "torchvision swin_v2": (
        partial(
            tv_swin.SwinTransformer,
            block=tv_swin.SwinTransformerBlockV2,
            downsample_layer=tv_swin.PatchMergingV2,
            **tv,
        ),
        32,
    ),
    "torchvision vit": (partial(torchvision.models.VisionTransformer, 32, 8, 2, 2, 16, 32), 32),
    "transformers SwinModel": (partial(transformers, "SwinModel", **hf_swin), 32),
    "transformers Swinv2Model": (partial(transformers, "Swinv2Model", **hf_swin), 32),
    "transformers ViTModel": (partial(transformers, "ViTModel", num_hidden_layers=2, **hf_vit), 32),
    "transformers PvtV2Model": (
        partial(
            transformers,
            "PvtV2Model",
            image_size=32,
            depths=[2, 2, 2, 2],
            hidden_sizes=[8, 16, 16, 32],
            num_attention_heads=[1, 2, 2, 4],
        ),
        32,
    ),
}
# Those that use the weights of some layers without calling the layers.
BYPASSING = [
    "swinv2",
    "beit",
    "eva02",
    "torchvision swin",
    "torchvision swin_v2",
    "torchvision vit",
]


def build(family: str) -> nn.Module:
    """Build the family's small model: the same weights every time, and nothing random in it."""
    torch.manual_seed(0)
    model = FAMILIES[family][0]()
    for module in model.modules():
        if hasattr(module, "drop_prob"):
            module.drop_prob = 0.0
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if type(module).__name__ == "StochasticDepth":
            module.p = 0.0
    return model


def images(family: str, batch: int = 2) -> torch.Tensor:
    """Return random images of the size that the family's small model takes."""
    size = FAMILIES[family][1]
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))


def outputs(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Run a model and return one tensor, whatever it wraps its output in."""
    result = model(x)
    if isinstance(result, dict):
        return result["last_hidden_state"]
    return result[0] if isinstance(result, (tuple, list)) else result


def baked(model: nn.Module, family: str) -> nn.Module:
    """Return a dense model with the masked weights of a pruned one, made without its hooks."""
    state = model.state_dict()
    for key in [key for key in state if key.endswith("_mask")]:
        name = key.removesuffix("_mask")
        state[name] = state.pop(f"{name}_orig") * state.pop(key)
    dense = build(family).to(next(model.parameters()).dtype)
    dense.load_state_dict(state)
    return dense.train(model.training)

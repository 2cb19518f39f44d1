"""Which attentions have heads, and where: one row per class."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch_dimap.families import biased, forwards, windows
from torch_dimap.families.rows import Row


def _qkv(reader: str = "proj", number: str = "num_heads", **more: Any) -> Row:
    return Row({"qkv": 3}, reader, number, **{"empty": forwards.NoHeads, **more})


def _split(names: str, reader: str = "proj", number: str = "num_heads", **more: Any) -> Row:
    return Row(dict.fromkeys(names.split(), 1), reader, number, **more)


def _maxvit(module: Any) -> Row:
    """The layout of query, key and value and the kind of position bias are options there."""
    bias = type(module.rel_pos).__name__
    return Row(
        {"qkv": 1 if module.head_first else 3}, "proj", "num_heads",
        empty=forwards.NoHeads, **_REL_POS.get(bias, {"mixed": ("rel_pos",)}),
    )  # fmt: skip


def _rel_pos_vit(module: Any) -> Row:
    bias = _REL_POS.get(type(module.rel_pos).__name__, {"mixed": ("rel_pos",)})
    return _qkv(forward=forwards.RelPosAttention, **bias)


def _nest(module: Any) -> Row:
    width = module.proj.in_features // max(1, module.num_heads)
    return _qkv(columns=width, forward=forwards.NestAttention)


# The position biases of timm.layers: what they hold for each head.
_REL_POS: dict[str, dict[str, Any]] = {
    "RelPosBias": {
        "along": {"rel_pos.relative_position_bias_table": 1},
        "places": {"rel_pos.bias_shape": 2},
    },
    "RelPosBiasTf": {
        "along": {"rel_pos.relative_position_bias_table": 0},
        "places": {"rel_pos.bias_shape": 0},
        "counts": ("rel_pos.num_heads",),
    },
    "RelPosMlp": {
        "along": {"rel_pos.mlp.fc2": 0},
        "places": {"rel_pos.bias_shape": 2},
        "counts": ("rel_pos.num_heads",),
    },
}
_BIASED = {"qkv": 3, "q_bias": 1, "v_bias": 1}
_HF_ATTENTION = _split("q_proj k_proj v_proj", "o_proj", "num_attention_heads")

# The class whose forward a module runs -> row, or what makes one for the module.
ATTENTIONS: dict[str, Row | Callable[[Any], Row]] = {
    # Their forwards follow the attributes.
    "timm.layers.attention.Attention": Row(
        {"qkv": 3, "gate": 1}, "proj", "num_heads", ("attn_dim",), mixed=("norm",),
        empty=forwards.NoHeads,
    ),
    "timm.layers.attention.AttentionRope": Row(
        {"qkv": 3, "q_proj": 1, "k_proj": 1, "v_proj": 1, "gate": 1}, "proj", "num_heads",
        ("attn_dim", "kv_dim"), ("num_kv_heads",), mixed=("norm",), empty=forwards.NoHeads,
    ),
    "timm.models.efficientformer.Attention": Row(
        {"qkv": 1}, "proj", "num_heads", ("val_attn_dim",), along={"attention_biases": 0},
    ),
    "timm.models.gemma4_vit.Gemma4Attention": _split(
        "q_proj.linear k_proj.linear v_proj.linear", "o_proj.linear", counts=("num_kv_heads",),
    ),
    "timm.models.hiera.MaskUnitAttention": Row({"qkv": 3}, "proj", "heads", ("dim_out",)),
    "timm.models.hieradet_sam2.MultiScaleAttention": Row({"qkv": 3}, "proj", "num_heads"),
    "timm.models.levit.Attention": Row(
        {"qkv.linear": 1}, "proj.ln.linear", "num_heads", ("val_attn_dim",),
        along={"qkv.bn": 0, "attention_biases": 0},
    ),
    "timm.models.levit.AttentionDownsample": Row(
        {"kv.linear": 1, "q.ln.linear": 1}, "proj.ln.linear", "num_heads", ("val_attn_dim",),
        along={"kv.bn": 0, "q.ln.bn": 0, "attention_biases": 0},
    ),
    "timm.models.maxxvit.Attention2d": _maxvit,
    "timm.models.maxxvit.AttentionCl": _maxvit,
    "timm.models.mvitv2.MultiScaleAttention": Row(
        {"qkv": 3}, "proj", "num_heads", ("dim_out",),
    ),
    "timm.models.swin_transformer.WindowAttention": _qkv(
        along={"relative_position_bias_table": 1},
    ),
    "timm.models.tiny_vit.Attention": Row(
        {"qkv": 1}, "proj", "num_heads", ("out_dim",), along={"attention_biases": 0},
    ),
    "timm.models.tnt.Attention": Row({"qk": 2, "v": 1}, "proj", "num_heads"),
    "timm.models.vision_transformer_sam.Attention": _qkv(),
    "timm.models.visformer.Attention": Row({"qkv": 3}, "proj", "num_heads"),
    "timm.models.volo.ClassAttention": Row({"kv": 2, "q": 1}, "proj", "num_heads"),
    "transformers.models.beit.modeling_beit.BeitLayer": Row(
        {"attention.q_proj": 1, "attention.k_proj": 1, "attention.v_proj": 1},
        "attention.o_proj", "attention.num_attention_heads",
        along={"relative_position_bias.relative_position_bias_table": 1},
    ),
    "transformers.models.cvt.modeling_cvt.CvtAttention": Row(
        {f"attention.projection_{x}": 1 for x in ("query", "key", "value")}, "output.dense",
        "attention.num_heads", ("attention.embed_dim",),
    ),
    "transformers.models.deit.modeling_deit.DeiTAttention": _HF_ATTENTION,
    "transformers.models.dinov2.modeling_dinov2.Dinov2Attention": _HF_ATTENTION,
    "transformers.models.hiera.modeling_hiera.HieraMaskUnitAttention": Row(
        {"qkv": 3}, "proj", "num_heads", ("hidden_size_output",),
    ),
    "transformers.models.pvt.modeling_pvt.PvtAttention": _split(
        "self.query self.key self.value", "output.dense", "self.num_attention_heads",
        widths=("self.all_head_size",),
    ),
    "transformers.models.segformer.modeling_segformer.SegformerAttention": _HF_ATTENTION,
    "transformers.models.siglip.modeling_siglip.SiglipAttention": _split(
        "q_proj k_proj v_proj", "out_proj",
    ),
    "transformers.models.swin.modeling_swin.SwinAttention": _split(
        "q_proj k_proj v_proj", "o_proj", "num_attention_heads",
        along={"relative_position_bias.relative_position_bias_table": 1},
    ),
    "transformers.models.swinv2.modeling_swinv2.Swinv2Attention": _split(
        "self.query self.key self.value", "output.dense", "self.num_attention_heads",
        widths=("self.all_head_size",),
        along={"self.logit_scale": 0, "self.continuous_position_bias_mlp.2": 0},
    ),
    "transformers.models.vit.modeling_vit.ViTAttention": _HF_ATTENTION,
    # Their forwards do not, and are replaced where heads are removed.
    "timm.models.beit.Attention": Row(
        _BIASED, "proj", "num_heads",
        along={"k_bias": 0, "relative_position_bias_table": 1},
        forward=biased.BeitAttention, empty=forwards.NoHeads,
    ),
    "timm.models.cait.ClassAttn": _split("q k v", forward=forwards.ClassAttention),
    "timm.models.convit.GPSA": Row(
        {"qk": 2, "v": 1}, "proj", "num_heads", along={"pos_proj": 0, "gating_param": 0},
        forward=forwards.GatedPositionalAttention, empty=forwards.NoHeads,
    ),
    "timm.models.convit.MHSA": _qkv(forward=forwards.SelfAttention),
    "timm.models.crossvit.CrossAttention": _split(
        "wq wk wv", forward=forwards.CrossAttention,
    ),
    "timm.models.davit.WindowAttention": _qkv(
        forward=forwards.DaVitWindowAttention, empty=None,
    ),
    "timm.models.edgenext.CrossCovarianceAttn": _qkv(
        along={"temperature": 0}, forward=forwards.CrossCovariance,
    ),
    "timm.models.eva.EvaAttention": Row(
        {**_BIASED, "q_proj": 1, "k_proj": 1, "v_proj": 1, "gate": 1}, "proj", "num_heads",
        along={"k_bias": 0}, mixed=("norm",),
        forward=biased.EvaAttention, empty=forwards.NoHeads,
    ),
    "timm.models.nest.Attention": _nest,
    "timm.models.nextvit.EfficientAttention": _split(
        "q k v", forward=forwards.NextViTAttention, empty=forwards.NoHeads,
    ),
    "timm.models.pvt_v2.Attention": Row(
        {"q": 1, "kv": 2}, "proj", "num_heads",
        forward=forwards.PooledAttention, empty=forwards.NoHeads,
    ),
    "timm.models.swin_transformer_v2.WindowAttention": Row(
        _BIASED, "proj", "num_heads",
        along={"k_bias": 0, "logit_scale": 0, "cpb_mlp.2": 0},
        forward=windows.SwinV2Attention, empty=forwards.NoHeads,
    ),
    "timm.models.swin_transformer_v2_cr.WindowMultiHeadAttention": _qkv(
        along={"logit_scale": 0, "meta_mlp.fc2": 0}, forward=windows.SwinV2CrAttention,
    ),
    "timm.models.twins.GlobalSubSampleAttn": Row(
        {"q": 1, "kv": 2}, "proj", "num_heads",
        forward=forwards.SubsampledAttention, empty=forwards.NoHeads,
    ),
    "timm.models.twins.LocallyGroupedAttn": _qkv(forward=windows.LocallyGroupedAttention),
    "timm.models.vision_transformer.Attention": _qkv(  # before timm 1.0.20
        mixed=("norm",), forward=forwards.ViTAttention,
    ),
    "timm.models.vision_transformer_relpos.RelPosAttention": _rel_pos_vit,
    "timm.models.volo.Attention": _qkv(forward=forwards.SelfAttention),
    "timm.models.xcit.XCA": _qkv(
        along={"temperature": 0}, forward=forwards.CrossCovariance,
    ),
    "torch.nn.modules.activation.MultiheadAttention": Row(
        {"in_proj_weight": 3, "in_proj_bias": 3}, "out_proj", "num_heads",
        mixed=("bias_k", "q_proj_weight"), forward=forwards.MultiHeadAttention,
    ),
    "torchvision.models.maxvit.RelativePositionalMultiHeadAttention": Row(
        {"to_qkv": 3}, "merge", "n_heads", along={"relative_position_bias_table": 1},
        forward=forwards.RelativePositionalAttention,
    ),
    "torchvision.models.swin_transformer.ShiftedWindowAttention": Row(
        {"qkv": 3}, "proj", "num_heads", along={"relative_position_bias_table": 1},
        forward=windows.ShiftedWindowAttention,
    ),
    "torchvision.models.swin_transformer.ShiftedWindowAttentionV2": Row(
        {"qkv": 3}, "proj", "num_heads", along={"logit_scale": 0, "cpb_mlp.2": 0},
        forward=windows.ShiftedWindowAttentionV2,
    ),
    "transformers.models.pvt_v2.modeling_pvt_v2.PvtV2SelfAttention": _split(
        "query key value", "proj", "num_attention_heads",
        forward=forwards.HuggingFacePooledAttention,
    ),
}  # fmt: skip

# Why the units of other classes stay: class -> reason.
REFUSED = {
    "timm.layers.halo_attn.HaloAttn": "no projection of its own reads its heads",
    "timm.models.cait.TalkingHeadAttn": "proj_l and proj_w mix its heads",
    "timm.models.coat.FactorAttnConvRelPosEnc": "layers share convolutions over groups of heads",
    "timm.models.csatv2.SpatialTransformerBlock": "it has one head of one channel",
    "timm.models.davit.ChannelAttention": "its heads are groups of channels of the input",
    "timm.models.efficientformer_v2.Attention2d": "talking heads mix its heads",
    "timm.models.efficientformer_v2.Attention2dDownsample": "talking heads mix its heads",
    "timm.models.efficientvit_msra.CascadedGroupAttention": "a head reads the one before it",
    "timm.models.gcvit.WindowAttentionGlobal": "the blocks of a stage share their queries",
    "timm.models.mobilevit.LinearSelfAttention": "it has one query for all channels",
    "timm.layers.attention2d.MultiQueryAttention2d": "all heads share one key and value",
    "timm.models.shvit.SHSA": "it has one head",
    "torch_dimap.operations.modules.Operation": "it was replaced by a convolution",
    "timm.models.swiftformer.EfficientAdditiveAttention": "it has no heads",
    "timm.models.volo.OutlookAttention": "its attention is folded over neighbouring places",
}

# What blocks may share per head: class of the model -> its attribute that says so.
SHARED = {
    "timm.models.beit.Beit": "rel_pos_bias",
    "timm.models.eva.Eva": "rope_mixed",
    "timm.models.naflexvit.NaFlexVit": "rope_is_mixed",
    "timm.models.vision_transformer_relpos.VisionTransformerRelPos": "shared_rel_pos",
    "transformers.models.beit.modeling_beit.BeitModel": "shared_position_bias",
}

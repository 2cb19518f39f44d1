"""Which MLPs have neurons, and where: one row per class."""

from __future__ import annotations

from torch_dimap.families.forwards import NoNeurons
from torch_dimap.families.rows import Row

_MLP = Row({"fc1": 1}, "fc2")

# The class whose forward a module runs -> row.
MLPS: dict[str, Row] = {
    "timm.layers.mlp.ConvMlp": Row({"fc1": 1}, "fc2", mixed=("norm",)),
    "timm.layers.mlp.GatedMlp": Row({"fc1": 1}, "fc2", mixed=("gate", "norm")),
    "timm.layers.mlp.GlobalResponseNormMlp": Row({"fc1": 1}, "fc2", mixed=("grn",)),
    "timm.layers.mlp.GluMlp": Row({"fc1": 2}, "fc2", mixed=("norm",)),
    "timm.layers.mlp.Mlp": Row(
        {"fc1": 1}, "fc2", mixed=("norm",), empty=NoNeurons,
    ),
    "timm.layers.mlp.SwiGLU": Row({"fc1_g": 1, "fc1_x": 1}, "fc2", mixed=("norm",)),
    "timm.models.efficientformer.ConvMlpWithNorm": Row({"fc1": 1}, "fc2", mixed=("norm1",)),
    "timm.models.efficientformer_v2.ConvMlpWithNorm": Row(
        {"fc1.conv": 1, "mid.conv": 1}, "fc2.conv", mixed=("fc1.bn", "mid.bn"),
    ),
    "timm.models.efficientvim.FFN": Row({"fc1.conv": 1}, "fc2.conv", mixed=("fc1.norm",)),
    "timm.models.efficientvit_msra.ConvMlp": Row(
        {"pw1.conv": 1}, "pw2.conv", mixed=("pw1.bn",),
    ),
    "timm.models.fasternet.MLPBlock": Row({"mlp.0": 1}, "mlp.3", mixed=("mlp.1",)),
    "timm.models.fastvit.ConvMlp": _MLP,
    "timm.models.gemma4_vit.Gemma4GatedMlp": Row(
        {"gate_proj.linear": 1, "up_proj.linear": 1}, "down_proj.linear",
    ),
    "timm.models.inception_next.ConvMlp": Row({"fc1": 1}, "fc2", mixed=("norm",)),
    "timm.models.levit.LevitMlp": Row({"ln1.linear": 1}, "ln2.linear", mixed=("ln1.bn",)),
    "timm.models.pvt_v2.MlpWithDepthwiseConv": Row({"fc1": 1, "dwconv": 1}, "fc2"),
    "timm.models.repvit.RepVitMlp": Row({"conv1.c": 1}, "conv2.c", mixed=("conv1.bn",)),
    "timm.models.shvit.FFN": Row({"pw1.c": 1}, "pw2.c", mixed=("pw1.bn",)),
    "timm.models.tiny_vit.NormMlp": _MLP,
    "timm.models.visformer.SpatialMlp": Row({"conv1": 1}, "conv3", mixed=("conv2",)),
    "timm.models.vitamin.GeGluMlp": Row({"w0": 1, "w1": 1}, "w2"),
    "torchvision.models.maxvit.PartitionAttentionLayer": Row(
        {"mlp_layer.1": 1}, "mlp_layer.3",
    ),
    "torchvision.models.vision_transformer.MLPBlock": Row({"0": 1}, "3"),
    "torchvision.ops.misc.MLP": Row({"0": 1}, "3"),
    "transformers.models.beit.modeling_beit.BeitMLP": _MLP,
    "transformers.models.cvt.modeling_cvt.CvtLayer": Row(
        {"intermediate.dense": 1}, "output.dense",
    ),
    "transformers.models.deit.modeling_deit.DeiTMLP": _MLP,
    "transformers.models.dinov2.modeling_dinov2.Dinov2MLP": _MLP,
    "transformers.models.hiera.modeling_hiera.HieraMlp": _MLP,
    "transformers.models.pvt.modeling_pvt.PvtFFN": Row({"dense1": 1}, "dense2"),
    "transformers.models.pvt_v2.modeling_pvt_v2.PvtV2ConvFeedForwardNetwork": Row(
        {"dense1": 1, "dwconv.dwconv": 1}, "dense2",
    ),
    "transformers.models.segformer.modeling_segformer.SegformerMixMLP": Row(
        {"fc1": 1, "dwconv.dwconv": 1}, "fc2",
    ),
    "transformers.models.siglip.modeling_siglip.SiglipMLP": _MLP,
    "transformers.models.swin.modeling_swin.SwinMLP": _MLP,
    "transformers.models.swinv2.modeling_swinv2.Swinv2Layer": Row(
        {"intermediate.dense": 1}, "output.dense",
    ),
    "transformers.models.vit.modeling_vit.ViTMLP": _MLP,
}  # fmt: skip

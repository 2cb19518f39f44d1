"""What has no units, or only units that cannot be removed: named, with the reason."""

from __future__ import annotations

import pytest
import timm
import torch
import torch.distributed as dist
from conftest import make_vit
from timm.layers import AttentionRope
from timm.models.nextvit import EfficientAttention
from torch import nn
from torch.nn.utils import parametrizations

from torch_dimap import group_units, remove_units, summarize
from torch_dimap.families.attentions import ATTENTIONS, REFUSED
from torch_dimap.families.mlps import MLPS
from torch_dimap.units import cut_units, units_left_out


@pytest.fixture
def vit() -> nn.Module:
    return make_vit()


STAY = {
    "cait_xxs24_224": "heads of TalkingHeadAttn: proj_l and proj_w mix its heads",
    "coat_tiny": "heads of FactorAttnConvRelPosEnc: layers share convolutions",
    "davit_tiny": "heads of ChannelAttention: its heads are groups of channels",
    "efficientformerv2_s0": "heads of Attention2d: talking heads mix its heads",
    "efficientvit_m0": "heads of CascadedGroupAttention: a head reads the one before it",
    "gcvit_xxtiny": "heads of WindowAttentionGlobal: the blocks of a stage share their queries",
    "mobilevitv2_050": "heads of LinearSelfAttention: it has one query",
    "shvit_s1": "heads of SHSA: it has one head",
    "visformer_tiny": r"stage1.0.mlp \(neurons\): conv2 mixes them",
    "volo_d1_224": "heads of OutlookAttention: its attention is folded",
    "vit_srelpos_small_patch16_224": "its blocks share shared_rel_pos, which is kept per head",
    "vit_small_patch16_rope_mixed_224": "its blocks share rope_mixed, which is kept per head",
    "convnextv2_atto": r"stages.0.blocks.0.mlp \(neurons\): grn mixes them",
    "eva02_base_patch14_224": r"blocks.0.mlp \(neurons\): norm mixes them",
}


def test_heads_of_another_number_than_their_width_says_stay(vit):
    vit.blocks[0].attn.num_heads //= 2  # as tensor-parallel plans have it: those of one process
    with pytest.warns(UserWarning, match=r"blocks.0.attn \(heads\): its heads are 8 wide"):
        heads = group_units(vit)["heads"]
    assert [layer.name for layer in heads] == ["blocks.1.attn", "blocks.2.attn"]


@pytest.mark.parametrize("name", STAY)
def test_group_units_names_what_stays(name):
    with torch.device("meta"):
        model = timm.create_model(name)
    if name.startswith("convnextv2"):  # has nothing else
        with pytest.raises(ValueError, match=STAY[name]):
            group_units(model)
        return
    with pytest.warns(UserWarning, match=STAY[name]):
        group_units(model)


def test_group_units_refuses_gmlp_whose_gate_mixes_neurons():
    with torch.device("meta"), pytest.raises(ValueError, match="mlp_channels .* gate mixes them"):
        group_units(timm.create_model("gmlp_ti16_224"))


def test_heads_that_share_keys_stay():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn = AttentionRope(64, 8, qkv_fused=False, num_kv_heads=2)

    assert units_left_out(Model())[0].startswith("attn (heads): ")
    assert "num_kv_heads is 2, not 1 x 8" in units_left_out(Model())[0]


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated")
@pytest.mark.parametrize("wrap", [nn.utils.weight_norm, parametrizations.weight_norm])
def test_layers_whose_weights_are_computed_stay(vit, wrap):
    wrap(vit.blocks[0].attn.qkv)
    wrap(vit.blocks[1].mlp.fc2)
    reasons = units_left_out(vit)
    assert reasons[0].startswith("blocks.0.attn (heads): qkv is wrapped, or its weight is computed")
    assert reasons[1] == "the neurons of Mlp, whose layers are wrapped or computed"
    with pytest.warns(UserWarning, match="qkv is wrapped"):
        units = group_units(vit)
    assert [x.name for x in units["heads"]] == ["blocks.1.attn", "blocks.2.attn"]
    assert [x.name for x in units["neurons"]] == ["blocks.0.mlp", "blocks.2.mlp"]


def test_layers_that_lora_wraps_stay(vit):
    peft = pytest.importorskip("peft", reason="LoRA needs peft")
    adapted = peft.get_peft_model(vit, peft.LoraConfig(target_modules=["qkv", "fc1"]))
    with pytest.raises(ValueError, match=r"blocks.0.attn \(heads\): qkv is wrapped"):
        group_units(adapted)


def test_summarize_leaves_units_alone_that_removal_refuses():
    model = timm.create_model(
        "vit_small_patch16_rope_mixed_224", img_size=32, embed_dim=24, depth=1, num_heads=3
    ).eval()
    image = torch.randn(1, 3, 32, 32)
    model.blocks[0].attn.proj.weight.data[:, :8] = 0
    with pytest.raises(RuntimeError, match="share rope_mixed"):
        remove_units(model)
    total = summarize(model, image).model
    assert total.slim_flops == total.flops.dense


def test_remove_units_refuses_a_model_whose_gradients_are_averaged(vit, tmp_path):
    if not (dist.is_available() and dist.is_gloo_available()):
        pytest.skip("torch was built without gloo")
    dist.init_process_group("gloo", f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(vit)
        with pytest.raises(TypeError, match="pass model.module, and wrap it anew"):
            remove_units(wrapped)
    finally:
        dist.destroy_process_group()


def test_shared_position_biases_of_beit_are_seen():
    with torch.device("meta"):
        model = timm.create_model(
            "beit_base_patch16_224", use_rel_pos_bias=False, use_shared_rel_pos_bias=True
        )
    with pytest.warns(UserWarning, match="share rel_pos_bias"):
        assert list(group_units(model)) == ["neurons"]


def test_no_class_has_a_row_and_a_reason_against_it():
    assert not {*ATTENTIONS, *MLPS} & REFUSED.keys()


def test_the_forward_for_next_vit_computes_what_the_original_does():
    torch.manual_seed(0)

    class Model(nn.Module):
        def __init__(self, ratio):
            super().__init__()
            self.attn = EfficientAttention(32, head_dim=8, sr_ratio=ratio)

        def forward(self, x):
            return self.attn(x)

    for ratio in (1, 2):
        model, x = Model(ratio).eval(), torch.randn(2, 16, 32)
        [layer] = group_units(model)["heads"]
        expected = model(x)
        cut_units({layer: torch.ones(4, dtype=torch.bool)})
        assert type(model.attn).__name__ == "SlimEfficientAttention"
        torch.testing.assert_close(model(x), expected)

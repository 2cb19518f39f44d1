"""What has no units, or only units that cannot be removed: named, with the reason."""

from __future__ import annotations

import pytest
import timm
import torch
from timm.layers import AttentionRope
from timm.models.nextvit import EfficientAttention
from torch import nn

from torch_dimap import group_units
from torch_dimap.units import cut_units, units_left_out
from torch_dimap.units.attentions import ATTENTIONS, REFUSED
from torch_dimap.units.mlps import MLPS

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

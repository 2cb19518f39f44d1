"""group_parameters: the right layers of every family, nothing else, and help where it fails."""

from __future__ import annotations

import functools
import re
import warnings

import pytest
import timm
import torch
import torchvision
from torch import nn
from torch.nn.utils import prune

import torch_dimap
from torch_dimap.masking.grouping import builtin_rule

# timm model -> the layers of each group, written down from the models' sources; a * is a
# number. The usual names are left out: attn.qkv, attn.proj, mlp.fc1 and mlp.fc2 in...
USUAL = {
    "swin_tiny_patch4_window7_224": "layers.*.blocks.*",
    "swin_s3_tiny_224": "layers.*.blocks.*",
    "swinv2_tiny_window8_256": "layers.*.blocks.*",
    "swinv2_cr_tiny_ns_224": "stages.*.blocks.*",
    "mvitv2_tiny": "stages.*.blocks.*",
    "hiera_tiny_224": "blocks.*",
    "coatnet_pico_rw_224": "stages.*.blocks.*",
    "coatnet_rmlp_nano_rw_224": "stages.*.blocks.*",
    "mobilevit_xxs": "stages.*.*.transformer.*",
    "nest_tiny": "levels.*.transformer_encoder.*",
    "pit_ti_224": "transformers.*.blocks.*",
    "davit_tiny": "stages.*.blocks.*.*",
    "gcvit_xxtiny": "stages.*.blocks.*",
    "vit_tiny_patch16_224": "blocks.*",
    "vit_relpos_small_patch16_224": "blocks.*",
    "vit_pe_core_tiny_patch16_384": "blocks.*",
    "deit_tiny_distilled_patch16_224": "blocks.*",
    "deit3_small_patch16_224": "blocks.*",
    "beit_base_patch16_224": "blocks.*",
    "beitv2_base_patch16_224": "blocks.*",
    "eva02_tiny_patch14_224": "blocks.*",
}
UNUSUAL = {
    "pvt_v2_b0": {
        "qkv": {"stages.*.blocks.*.attn.q", "stages.*.blocks.*.attn.kv"},
        "proj": {"stages.*.blocks.*.attn.proj"},
        "mlp": {"stages.*.blocks.*.mlp.fc*"},
    },
    "twins_svt_small": {
        "qkv": {f"blocks.*.*.attn.{layer}" for layer in ("qkv", "q", "kv")},
        "proj": {"blocks.*.*.attn.proj"},
        "mlp": {"blocks.*.*.mlp.fc*"},
    },
    "maxvit_pico_rw_256": {
        "qkv": {f"stages.*.blocks.*.attn_{kind}.attn.qkv" for kind in ("block", "grid")},
        "proj": {f"stages.*.blocks.*.attn_{kind}.attn.proj" for kind in ("block", "grid")},
        "mlp": {f"stages.*.blocks.*.attn_{kind}.mlp.fc*" for kind in ("block", "grid")},
    },
    "mobilevitv2_050": {
        "qkv": {"stages.*.*.transformer.*.attn.qkv_proj"},
        "proj": {"stages.*.*.transformer.*.attn.out_proj"},
        "mlp": {"stages.*.*.transformer.*.mlp.fc*"},
    },
    "levit_128s": {
        "qkv": {
            "stages.*.blocks.*.attn.qkv.linear",
            "stages.*.downsample.attn_downsample.kv.linear",
            "stages.*.downsample.attn_downsample.q.ln.linear",
        },
        "proj": {
            "stages.*.blocks.*.attn.proj.ln.linear",
            "stages.*.downsample.attn_downsample.proj.ln.linear",
        },
        "mlp": {"stages.*.blocks.*.mlp.ln*.linear", "stages.*.downsample.mlp.ln*.linear"},
    },
    "xcit_nano_12_p16_224": {
        "qkv": {"blocks.*.attn.qkv", *(f"cls_attn_blocks.*.attn.{layer}" for layer in "qkv")},
        "proj": {"blocks.*.attn.proj", "cls_attn_blocks.*.attn.proj"},
        "mlp": {"blocks.*.mlp.fc*", "cls_attn_blocks.*.mlp.fc*"},
    },
    "cait_xxs24_224": {
        "qkv": {"blocks.*.attn.qkv", *(f"blocks_token_only.*.attn.{layer}" for layer in "qkv")},
        "proj": {"blocks.*.attn.proj", "blocks_token_only.*.attn.proj"},
        "mlp": {"blocks.*.mlp.fc*", "blocks_token_only.*.mlp.fc*"},
    },
    "convit_tiny": {
        "qkv": {f"blocks.*.attn.{layer}" for layer in ("qk", "v", "qkv")},
        "proj": {"blocks.*.attn.proj"},
        "mlp": {"blocks.*.mlp.fc*"},
    },
    "crossvit_tiny_240": {
        "qkv": {
            "blocks.*.blocks.*.*.attn.qkv",
            *(f"blocks.*.fusion.*.attn.w{layer}" for layer in "qkv"),
        },
        "proj": {"blocks.*.blocks.*.*.attn.proj", "blocks.*.fusion.*.attn.proj"},
        "mlp": {"blocks.*.blocks.*.*.mlp.fc*"},
    },
    "volo_d1_224": {
        "qkv": {
            *(f"network.*.*.attn.{layer}" for layer in ("qkv", "v", "attn")),
            *(f"post_network.*.attn.{layer}" for layer in ("q", "kv")),
        },
        "proj": {"network.*.*.attn.proj", "post_network.*.attn.proj"},
        "mlp": {"network.*.*.mlp.fc*", "post_network.*.mlp.fc*"},
    },
    "efficientformer_l1": {
        "qkv": {"stages.*.blocks.*.token_mixer.qkv"},
        "proj": {"stages.*.blocks.*.token_mixer.proj"},
        "mlp": {"stages.*.blocks.*.mlp.fc*"},
    },
    "eva02_small_patch14_224": {
        "qkv": {"blocks.*.attn.qkv"},
        "proj": {"blocks.*.attn.proj"},
        "mlp": {"blocks.*.mlp.fc*"},
    },
    "eva02_base_patch14_224": {
        "qkv": {f"blocks.*.attn.{layer}_proj" for layer in "qkv"},
        "proj": {"blocks.*.attn.proj"},
        "mlp": {"blocks.*.mlp.fc*", "blocks.*.mlp.fc*_g", "blocks.*.mlp.fc*_x"},
    },
    "vit_base_patch16_18x2_224": {
        "qkv": {"blocks.*.attns.*.attn.qkv"},
        "proj": {"blocks.*.attns.*.attn.proj"},
        "mlp": {"blocks.*.ffns.*.mlp.fc*"},
    },
    "vitamin_small_224": {
        "qkv": {"blocks.*.attn.qkv"},
        "proj": {"blocks.*.attn.proj"},
        "mlp": {"blocks.*.mlp.w*"},
    },
}
EXPECTED = {
    **UNUSUAL,
    **{
        model: {
            "qkv": {f"{block}.attn.qkv"},
            "proj": {f"{block}.attn.proj"},
            "mlp": {f"{block}.mlp.fc*"},
        }
        for model, block in USUAL.items()
    },
}


def build(name, library=timm, **kwargs):
    """Build a model without the time and memory that its weights would take."""
    with torch.device("meta"):
        if library is timm:
            if not timm.is_model(name):
                pytest.skip(f"this timm has no {name}")
            return timm.create_model(name, **kwargs)
        return getattr(library, name)(**kwargs)


shared = functools.lru_cache(build)  # these tests only read their models


def qualified(model, groups):
    """Group -> the qualified names of its tensors."""
    names = {module: name for name, module in model.named_modules()}
    return {g: [f"{names[module]}.{name}" for module, name in ps] for g, ps in groups.items()}


def kinds(model, groups):
    """Group -> its layers' names, numbers replaced by a star."""
    return {
        group: {re.sub(r"\d+", "*", name.removesuffix(".weight")) for name in names}
        for group, names in qualified(model, groups).items()
    }


@pytest.mark.parametrize("name", EXPECTED)
def test_group_parameters_finds_the_layers_of(name):
    model = shared(name)
    assert kinds(model, torch_dimap.group_parameters(model)) == EXPECTED[name]


@pytest.mark.parametrize("name", EXPECTED)
def test_group_parameters_finds_all_blocks_of(name):
    model = shared(name)
    groups = torch_dimap.group_parameters(model)
    found = {n for names in qualified(model, groups).values() for n in names}
    wanted = {
        parameter
        for parameter, _ in model.named_parameters()
        for group in EXPECTED[name].values()
        if re.sub(r"\d+", "*", parameter.removesuffix(".weight")) in group
    }
    assert found == wanted


@pytest.mark.parametrize("name", EXPECTED)
def test_group_parameters_takes_each_weight_once_and_no_bias(name):
    pairs = [p for ps in torch_dimap.group_parameters(shared(name)).values() for p in ps]
    tensors = [getattr(module, parameter) for module, parameter in pairs]
    assert len({id(tensor) for tensor in tensors}) == len(tensors)
    assert all(tensor.dim() in (2, 4) for tensor in tensors)


@pytest.mark.parametrize(
    ("name", "lookalike"),
    [
        ("swinv2_tiny_window8_256", "attn.cpb_mlp.*"),
        ("swinv2_tiny_window8_256", "downsample.reduction"),
        ("swinv2_cr_tiny_ns_224", "attn.meta_mlp.fc*"),
        ("vit_relpos_small_patch16_224", "attn.rel_pos.mlp.fc*"),
        ("vit_srelpos_small_patch16_224", "shared_rel_pos.mlp.fc*"),
        ("vit_pe_core_tiny_patch16_384", "patch_embed.proj"),
        ("vit_base_patch16_siglip_224", "attn_pool.kv"),
        ("vit_base_patch16_siglip_224", "attn_pool.mlp.fc*"),
        ("maxvit_pico_rw_256", "conv.se.fc*"),
        ("maxvit_pico_rw_256", "conv.conv*_*x*"),
        ("coatnet_pico_rw_224", "shortcut.expand"),
        ("hiera_tiny_224", "blocks.*.proj"),
        ("mvitv2_tiny", "shortcut_proj_attn"),
        ("mvitv2_tiny", "attn.pool_q"),
        ("pvt_v2_b0", "attn.sr"),
        ("pvt_v2_b0", "downsample.proj"),
        ("twins_svt_small", "attn.sr"),
        ("twins_svt_small", "patch_embeds.*.proj"),
        ("mobilevit_xxs", "conv_proj.conv"),
        ("nest_tiny", "pool.conv"),
        ("pit_ti_224", "pool.fc"),
        ("xcit_nano_12_p16_224", "pos_embed.token_projection"),
        ("cait_xxs24_224", "attn.proj_l"),
        ("convit_tiny", "attn.pos_proj"),
        ("crossvit_tiny_240", "projs.*.*"),
        ("volo_d1_224", "network.*.proj"),
        ("volo_d1_224", "aux_head"),
        ("deit_tiny_distilled_patch16_224", "head_dist"),
    ],
)
def test_group_parameters_leaves_out(name, lookalike):
    model = shared(name)
    names = {re.sub(r"\d+", "*", n.removesuffix(".weight")) for n, _ in model.named_parameters()}
    assert any(n.endswith(lookalike) for n in names)
    found = set().union(*kinds(model, torch_dimap.group_parameters(model)).values())
    blocks = {n for n in found if re.search(rf"(^|\.){re.escape(lookalike)}$", n)}
    assert blocks <= {"blocks.*.attn.proj"}  # of Hiera, which is not blocks.*.proj


@pytest.mark.parametrize("name", ["swin_t", "swin_s", "swin_b", "swin_v2_t", "swin_v2_b"])
def test_group_parameters_groups_the_swins_of_torchvision(name):
    model = build(name, torchvision.models)
    assert kinds(model, torch_dimap.group_parameters(model)) == {
        "qkv": {"features.*.*.attn.qkv"},
        "proj": {"features.*.*.attn.proj"},
        "mlp": {"features.*.*.mlp.*"},
    }


def test_group_parameters_groups_multihead_attention():
    model = build("vit_b_16", torchvision.models)
    attention = "encoder.layers.encoder_layer_*.self_attention"
    assert kinds(model, torch_dimap.group_parameters(model)) == {
        "qkv": {f"{attention}.in_proj_weight"},
        "proj": {f"{attention}.out_proj"},
        "mlp": {"encoder.layers.encoder_layer_*.mlp.*"},
    }


def test_group_parameters_groups_separate_multihead_projections_under_any_name():
    model = nn.ModuleDict({"mix": nn.MultiheadAttention(8, 2, kdim=6, vdim=4)})
    assert qualified(model, torch_dimap.group_parameters(model)) == {
        "qkv": [f"mix.{which}_proj_weight" for which in "qkv"],
        "proj": ["mix.out_proj.weight"],
    }


def test_group_parameters_groups_torchvision_maxvit():
    model = build("maxvit_t", torchvision.models)
    found = kinds(model, torch_dimap.group_parameters(model))
    assert {n.rpartition("layers.")[2] for names in found.values() for n in names} == {
        f"{where}_attention.{layer}"
        for where in ("window", "grid")
        for layer in ("attn_layer.*.to_qkv", "attn_layer.*.merge", "mlp_layer.*")
    }


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("SwinModel", {"qkv": 36, "proj": 12, "mlp": 24}),
        ("Swinv2Model", {"qkv": 36, "proj": 12, "mlp": 24}),
        ("ViTModel", {"qkv": 36, "proj": 12, "mlp": 24}),
        ("PvtV2Model", {"qkv": 24, "proj": 8, "mlp": 16}),
        ("SegformerModel", {"qkv": 24, "proj": 8, "mlp": 16}),
        ("HieraModel", {"qkv": 24, "proj": 24, "mlp": 48}),
        ("CvtModel", {"qkv": 39, "proj": 13, "mlp": 26}),
        ("SiglipVisionModel", {"qkv": 36, "proj": 12, "mlp": 24}),
    ],
)
def test_group_parameters_groups_models_of_transformers(name, counts):
    transformers = pytest.importorskip("transformers")
    model_class = getattr(transformers, name)
    model = build(name, transformers, config=model_class.config_class())
    groups = torch_dimap.group_parameters(model)
    assert {group: len(pairs) for group, pairs in groups.items()} == counts


@pytest.mark.parametrize(
    "layer",  # mostly the names before transformers 5
    [
        "encoder.layers.0.blocks.1.attention.self.query qkv",
        "encoder.layers.0.blocks.1.attention.output.dense proj",
        "encoder.layers.0.blocks.1.intermediate.dense mlp",
        "encoder.layers.0.blocks.1.output.dense mlp",
        "encoder.layer.3.attention.attention.value qkv",
        "encoder.layer.3.mlp.weights_in mlp",
        "blocks.0.attn.attn.proj proj",
        "pooler.dense None",
        "encoder.layers.0.blocks.1.attention.self.continuous_position_bias_mlp.0 None",
    ],
)
def test_builtin_rule_knows_the_layer(layer):
    name, group = layer.split()
    assert str(builtin_rule(name, nn.Linear(2, 2), "weight")) == group
    assert builtin_rule(name, nn.Linear(2, 2), "bias") is None


@pytest.mark.parametrize(
    "name", ["swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256", "pvt_v2_b0", "mvitv2_tiny",
             "maxvit_pico_rw_256", "hiera_tiny_224", "nest_tiny", "vit_tiny_patch16_224"]
)  # fmt: skip
def test_group_parameters_groups_feature_backbones_like_their_classifiers(name):
    def shapes(model):
        return {
            group: [tuple(getattr(*pair).shape) for pair in pairs]
            for group, pairs in torch_dimap.group_parameters(model).items()
        }

    assert shapes(build(name, features_only=True)) == shapes(build(name))


@pytest.mark.parametrize("wrap", [lambda m: nn.Sequential(m), lambda m: nn.ModuleDict({"net": m})])
def test_group_parameters_finds_a_model_inside_another(wrap):
    model = build("pvt_v2_b0")
    assert torch_dimap.group_parameters(wrap(model)) == torch_dimap.group_parameters(model)


def test_group_parameters_orders_pairs_by_definition():
    model = build("vit_tiny_patch16_224")
    groups = torch_dimap.group_parameters(model)
    assert list(groups) == ["qkv", "proj", "mlp"]
    order = [name for name, _ in model.named_parameters()]
    for names in qualified(model, groups).values():
        assert names == sorted(names, key=order.index)


def test_group_parameters_groups_a_pruned_model_like_the_dense_one():
    model = nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2), "mlp": nn.ModuleDict()})
    model["mlp"]["fc1"] = nn.Linear(8, 8)
    dense = torch_dimap.group_parameters(model)
    prune.l1_unstructured(model["attn"], "in_proj_weight", 0.5)
    prune.l1_unstructured(model["mlp"]["fc1"], "weight", 0.5)
    assert torch_dimap.group_parameters(model) == dense


def test_group_parameters_walks_the_model_once(monkeypatch):
    model = build("vit_tiny_patch16_224")
    walks = []
    walk = nn.Module.named_modules

    def counting(self, *args, **kwargs):
        walks.append(self)
        return walk(self, *args, **kwargs)

    monkeypatch.setattr(nn.Module, "named_modules", counting)
    torch_dimap.group_parameters(model)
    # torch's Module.named_parameters(recurse=False) does not come through here
    assert walks.count(model) == 1


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("swiftformer_xs", r"only \d+% of the weights in the blocks of SwiftFormer.*pwconv"),
        ("halonet26t", r"ByobNet.*conv\*_kxk"),
        ("mobilenetv5_base", r"MobileNetV5.*pw_exp"),
    ],
)
def test_group_parameters_warns_of_what_it_does_not_recognise(name, part):
    with pytest.warns(UserWarning, match=part):
        torch_dimap.group_parameters(build(name))


@pytest.mark.parametrize("name", EXPECTED)
def test_group_parameters_does_not_warn_for(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch_dimap.group_parameters(shared(name))


@pytest.mark.parametrize("name", ["resnet18", "efficientnet_b0", "seresnet33ts"])
def test_group_parameters_refuses_a_model_without_transformer_blocks(name):
    with pytest.raises(ValueError, match="no layer .* named like .* its blocks hold .*pass rule="):
        torch_dimap.group_parameters(build(name))


def test_group_parameters_refuses_query_key_value_and_mlp_in_one_matrix():
    with pytest.raises(ValueError, match=r"blocks\.\*\.in_proj\.weight"):
        torch_dimap.group_parameters(build("vit_base_patch16_xp_224"))


def test_group_parameters_refuses_what_is_no_module():
    with pytest.raises(TypeError, match="model must be an nn.Module, found str"):
        torch_dimap.group_parameters("swin_tiny_patch4_window7_224")


@pytest.mark.filterwarnings("ignore:`torch.jit.trace")
def test_group_parameters_refuses_a_scripted_model():
    with pytest.raises(ValueError, match="no layer of .* is named like"):
        torch_dimap.group_parameters(torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)))


def test_group_parameters_refuses_a_single_layer():
    with pytest.raises(ValueError, match="no layer of Linear is named .* transformer: pass rule="):
        torch_dimap.group_parameters(nn.Linear(2, 2))


def tied():
    model = nn.ModuleDict({"attn": nn.ModuleDict({"q": nn.Linear(4, 4), "k": nn.Linear(4, 4)})})
    model["attn"]["k"].weight = model["attn"]["q"].weight
    return model


def test_group_parameters_refuses_tied_weights_naming_both_places():
    with pytest.raises(ValueError, match=r"tied to attn\.q\.weight and attn\.k\.weight"):
        torch_dimap.group_parameters(tied())


def test_group_parameters_refuses_a_weight_tied_to_an_auxiliary_one():
    model = nn.ModuleDict({"embed": nn.Embedding(4, 4), "mlp": nn.ModuleDict()})
    model["mlp"]["fc1"] = nn.Linear(4, 4)
    model["mlp"]["fc1"].weight = model["embed"].weight
    with pytest.raises(ValueError, match=r"tied to embed\.weight and mlp\.fc1\.weight"):
        torch_dimap.group_parameters(model)


def test_group_parameters_takes_a_shared_module_once():
    layer = nn.Linear(4, 4)
    model = nn.ModuleDict({"attn": nn.ModuleDict({"q": layer, "k": layer})})
    assert torch_dimap.group_parameters(model) == {"qkv": [(layer, "weight")]}


def test_group_parameters_leaves_ties_outside_the_groups_alone():
    def only_mlp(qualified_name, module, name):
        return "mlp" if "mlp" in qualified_name and name == "weight" else None

    model = tied()
    model["mlp"] = nn.Linear(4, 4)
    groups = torch_dimap.group_parameters(model, rule=only_mlp)
    assert groups == {"mlp": [(model["mlp"], "weight")]}


def test_group_parameters_follows_a_rule_of_ones_own():
    def per_block(qualified_name, module, name):
        group = builtin_rule(qualified_name, module, name)
        return group and f"{group} of {qualified_name.partition('.attn')[0].partition('.mlp')[0]}"

    groups = torch_dimap.group_parameters(build("vit_tiny_patch16_224"), rule=per_block)
    assert {g: len(pairs) for g, pairs in groups.items() if "blocks.3" in g} == {
        "qkv of blocks.3": 1,
        "proj of blocks.3": 1,
        "mlp of blocks.3": 2,
    }


def test_group_parameters_refuses_a_rule_that_returns_no_name():
    with pytest.raises(TypeError, match="must return a group's name or None, found int for weight"):
        torch_dimap.group_parameters(nn.Linear(2, 2), rule=lambda *_: 1)


def test_group_parameters_refuses_a_rule_that_finds_nothing():
    with pytest.raises(ValueError, match="rule put no parameter of Linear into a group"):
        torch_dimap.group_parameters(nn.Linear(2, 2), rule=lambda *_: None)

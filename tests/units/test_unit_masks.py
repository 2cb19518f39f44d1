"""Whole units masked: exact counts, torch's own masks, and every refusal."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn
from torch.nn.utils import prune

from torch_dimap import (
    dimap_scores,
    global_module_aware_structured,
    global_module_aware_unstructured,
    group_parameters,
    group_units,
    remove_all,
)
from torch_dimap.units import unit_magnitudes

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def vit() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=4, in_chans=1, num_classes=10,
        embed_dim=32, depth=3, num_heads=4,
    ).eval()  # fmt: skip


def test_global_module_aware_structured_masks_whole_units_and_nothing_else(swin):
    untouched = {name for name, _ in swin.named_parameters()}
    done = global_module_aware_structured(group_units(swin), {"heads": 0.5, "neurons": 0.25})
    assert done["heads"].pruned == 6 and sum(done["heads"].kept.values()) == 6
    assert done["neurons"].pruned == 96 and sum(done["neurons"].kept.values()) == 288
    for name, heads in done["heads"].kept.items():
        attention = swin.get_submodule(name)
        width = attention.proj.in_features // attention.num_heads
        rows = attention.qkv.weight_mask.view(3, -1, width, attention.qkv.in_features)
        assert rows.dtype == torch.bool
        kept = rows[0, :, 0, 0]
        assert int(kept.sum()) == heads
        assert torch.equal(rows, kept.view(1, -1, 1, 1).expand_as(rows))
        assert torch.equal(attention.qkv.bias_mask, kept.repeat_interleave(width).repeat(3))
        assert torch.equal(attention.proj.weight_mask[0], kept.repeat_interleave(width))
    for name, neurons in done["neurons"].kept.items():
        mlp = swin.get_submodule(name)
        assert int(mlp.fc1.bias_mask.sum()) == neurons and neurons % 16 == 0
        assert torch.equal(mlp.fc1.weight_mask[:, 0], mlp.fc1.bias_mask)
        assert torch.equal(mlp.fc2.weight_mask[0], mlp.fc1.bias_mask)
    masked = {name for name, _ in swin.named_parameters() if name.endswith("_orig")}
    assert {name.removesuffix("_orig") for name in masked} == {
        name for name in untouched
        if name.endswith(("qkv.weight", "qkv.bias", "attn.proj.weight", "fc1.weight", "fc1.bias"))
        or name.endswith("fc2.weight")
    }  # fmt: skip


def test_global_module_aware_structured_ranks_by_the_share_of_the_layer(vit):
    units = group_units(vit)["heads"]
    scores = torch.cat([dimap_scores(unit_magnitudes(layer)) for layer in units])
    done = global_module_aware_structured(units, 5)["all"]
    assert done.pruned == 5
    assert done.threshold == float(scores.sort().values[4])
    kept = torch.cat([layer.unmasked() for layer in units])
    assert torch.equal(kept, scores > done.threshold)


def test_unit_magnitudes_are_norms_of_rows_and_biases_times_norms_of_columns(vit):
    nn.init.normal_(vit.blocks[1].mlp.fc1.bias)
    mlp = vit.blocks[1].mlp
    layer = group_units(vit)["neurons"][1]
    rows = torch.cat([mlp.fc1.weight, mlp.fc1.bias[:, None]], 1).double().norm(dim=1)
    torch.testing.assert_close(unit_magnitudes(layer), rows * mlp.fc2.weight.double().norm(dim=0))
    heads = group_units(vit)["heads"][1]
    qkv, proj = vit.blocks[1].attn.qkv, vit.blocks[1].attn.proj
    rows = torch.cat([qkv.weight, qkv.bias[:, None]], 1).view(3, 4, 8, -1).double()
    columns = proj.weight.view(32, 4, 8).double()
    expected = (rows.square().sum((0, 2, 3)) * columns.square().sum((0, 2))).sqrt()
    torch.testing.assert_close(unit_magnitudes(heads), expected)


def test_layers_as_groups_of_their_own_lose_the_same_share(swin):
    units = group_units(swin)
    layers = {layer.name: [layer] for kind in units.values() for layer in kind}
    done = global_module_aware_structured(layers, amount=0.5)
    assert {name: group.kept[name] for name, group in done.items()} == {
        name: layer.units // 2 for name, [layer] in layers.items()
    }


def test_masks_only_shrink_and_count_what_is_unmasked(swin):
    units = group_units(swin)
    first = global_module_aware_structured(units, 0.5)
    before = {layer: layer.unmasked() for layers in units.values() for layer in layers}
    second = global_module_aware_structured(units, {"heads": 2, "neurons": 0.5}, multiple=1)
    assert second["heads"].pruned == 2
    assert second["neurons"].pruned == round(sum(first["neurons"].kept.values()) / 2)
    assert all(not (layer.unmasked() & ~old).any() for layer, old in before.items())


def test_structured_and_unstructured_pruning_compose(swin, images):
    swin.eval()
    global_module_aware_unstructured(group_parameters(swin), amount=0.5)
    zeros = {m: m.weight_mask.clone() for m in swin.modules() if hasattr(m, "weight_mask")}
    units = group_units(swin)
    global_module_aware_structured(units, 0.25)
    assert all(not (m.weight_mask & ~old).any() for m, old in zeros.items())
    left = {layer: layer.unmasked() for layers in units.values() for layer in layers}
    global_module_aware_unstructured(group_parameters(swin), amount=0.5)
    assert all(not (layer.unmasked() & ~old).any() for layer, old in left.items())
    expected = swin(images)
    remove_all(swin)
    assert torch.equal(swin(images), expected)
    assert not prune.is_pruned(swin)


def test_a_masked_unit_gives_nothing_and_gets_no_gradient(vit):
    units = group_units(vit)
    global_module_aware_structured(units, 0.5)
    seen = []
    for layer in units["neurons"]:
        layer.reader.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    vit(torch.randn(2, 1, 16, 16)).sum().backward()
    for layer, inputs in zip(units["neurons"], seen):
        assert not inputs[..., ~layer.unmasked()].any()
        rows = layer.parts[0]
        view, others = rows.by_unit(rows.tensor.grad)
        assert torch.equal((view != 0).any(others), layer.unmasked())


@pytest.mark.parametrize("key", ["layer", "name"])
def test_importance_scores_take_the_place_of_the_norms(vit, key):
    units = group_units(vit)["heads"]
    wanted = torch.tensor([4.0, 1.0, 3.0, 2.0])
    scores = {layer if key == "layer" else layer.name: wanted for layer in units}
    global_module_aware_structured(units, 0.5, scores)
    for layer in units:
        assert layer.unmasked().tolist() == [True, False, True, False]


@pytest.mark.parametrize("method", [prune.L1Unstructured, prune.RandomUnstructured])
def test_other_rankings_take_exact_counts(vit, method):
    units = group_units(vit)
    done = global_module_aware_structured(units, 0.5, pruning_method=method, multiple=1)
    assert {group: cut.pruned for group, cut in done.items()} == {"heads": 6, "neurons": 192}


def test_zeros_go_first(vit):
    units = group_units(vit)["heads"]
    with torch.no_grad():
        for part in units[1].parts:
            view, _ = part.by_unit(part.tensor)
            view.select(part.dim + 1, 2).zero_()
    done = global_module_aware_structured(units, 1)["all"]
    assert done.threshold == 0.0
    assert units[1].unmasked().tolist() == [True, True, False, True]


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


REFUSED = {
    "a model": (lambda m, u: ((m, 0.5), {}), TypeError, "units must be a mapping"),
    "parameters": (lambda m, u: ((group_parameters(m), 0.5), {}), TypeError, "hold unit layers"),
    "nothing": (lambda m, u: (({}, 0.5), {}), ValueError, "units is empty"),
    "an empty group": (lambda m, u: (({"heads": []}, 0.5), {}), ValueError, "is empty"),
    "a layer twice": (lambda m, u: ((u["heads"] * 2, 0.5), {}), ValueError, "listed twice"),
    "too many": (lambda m, u: ((u, 1.0), {}), ValueError, "'heads' 12 units .* only 9 can"),
    "more than all": (lambda m, u: ((u, 1000), {}), ValueError, "only 396 are unpruned"),
    "a fraction above 1": (lambda m, u: ((u, 1.5), {}), ValueError, "must lie in"),
    "an unknown group": (lambda m, u: ((u, {"qkv": 0.5}), {}), ValueError, "name the groups"),
    "minimum": (lambda m, u: ((u, 0.5), {"minimum": -1}), ValueError, "minimum must be 0 or"),
    "multiple": (lambda m, u: ((u, 0.5), {"multiple": 1.0}), TypeError, "multiple must be an int"),
    "a method": (
        lambda m, u: ((u, 0.5), {"pruning_method": prune.LnStructured}),
        TypeError, "must be one of DimapUnstructured",
    ),
    "no scores": (lambda m, u: ((u, 0.5, {}), {}), ValueError, "has none for blocks.0.attn"),
    "scores of another shape": (
        lambda m, u: ((u["heads"], 0.5, {x: torch.ones(3) for x in u["heads"]}), {}),
        ValueError, r"must have the shape \(4,\), found \(3,\)",
    ),
    "scores for others": (
        lambda m, u: ((u["heads"], 0.5, {
            x: torch.ones(x.units) for layers in u.values() for x in layers
        }), {}),
        ValueError, "found 3 more",
    ),
    "scores without a rank": (
        lambda m, u: ((u["heads"], 0.5, {x: torch.full((4,), torch.nan) for x in u["heads"]}), {}),
        ValueError, "NaN",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_global_module_aware_structured_refuses(vit, case):
    arguments, error, message = REFUSED[case]
    units = group_units(vit)
    before = state(vit)
    positional, named = arguments(vit, units)
    with pytest.raises(error, match=message):
        global_module_aware_structured(*positional, **named)
    after = state(vit)
    assert before.keys() == after.keys()
    assert all(map(torch.equal, before.values(), after.values()))


def test_global_module_aware_structured_refuses_weights_without_a_rank(vit):
    units = group_units(vit)
    vit.blocks[2].mlp.fc2.weight.data[0, 0] = torch.inf
    with pytest.raises(ValueError, match="infinite"):
        global_module_aware_structured(units, 0.5)
    assert not prune.is_pruned(vit)


def test_global_module_aware_structured_refuses_a_description_out_of_date(vit):
    from torch_dimap import remove_units

    units = group_units(vit)
    global_module_aware_structured(units, 0.5)
    remove_units(vit)
    with pytest.raises(ValueError, match="had 4 heads when it was described"):
        global_module_aware_structured(units, 0.5)

"""Where a model keeps its heads and neurons."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

from torch_dimap import global_module_aware_structured, group_units, remove_units
from torch_dimap.units import UnitLayer, builtin_unit_rule

pytestmark = pytest.mark.usefixtures("one_thread")


def test_group_units_describes_a_swin(swin):
    groups = group_units(swin)
    assert list(groups) == ["heads", "neurons"]
    names = [f"layers.{i}.blocks.{j}" for i in range(2) for j in range(2)]
    assert [layer.name for layer in groups["heads"]] == [f"{name}.attn" for name in names]
    assert [layer.name for layer in groups["neurons"]] == [f"{name}.mlp" for name in names]
    assert [layer.units for layer in groups["heads"]] == [2, 2, 4, 4]
    assert [layer.units for layer in groups["neurons"]] == [64, 64, 128, 128]
    attention = swin.layers[1].blocks[0].attn
    layer = groups["heads"][2]
    assert layer.module is attention and layer.reader is attention.proj
    found = {(p.module, p.name): (p.dim, p.blocks, p.entries, p.masked) for p in layer.parts}
    assert found == {
        (attention.qkv, "weight"): (0, 3, 8, True),
        (attention.qkv, "bias"): (0, 3, 8, True),
        (attention, "relative_position_bias_table"): (1, 1, 1, False),
        (attention.proj, "weight"): (1, 1, 8, True),
    }
    assert [(a.module, a.name, a.per_unit) for a in layer.attributes] == [
        (attention, "num_heads", 1)
    ]


def test_the_parts_hold_all_weights_of_a_layer(swin):
    for layer in group_units(swin)["neurons"]:
        for part in layer.parts:
            view, others = part.by_unit(part.tensor)
            assert view.shape[part.dim + 1] == layer.units
            assert view.numel() == part.tensor.numel()


def test_the_description_of_a_masked_model_is_the_same(swin):
    before = group_units(swin)
    global_module_aware_structured(before, 0.25)
    assert group_units(swin) == before


def test_group_units_takes_a_rule():
    vit = timm.create_model("vit_tiny_patch16_224", depth=2)

    def last_block(name, module):
        return builtin_unit_rule(name, module) if name.startswith("blocks.1") else ()

    groups = group_units(vit, last_block)
    assert [x.name for layers in groups.values() for x in layers] == [
        "blocks.1.attn", "blocks.1.mlp",
    ]  # fmt: skip


def test_group_units_refuses_what_has_no_units():
    with pytest.raises(ValueError, match="no heads or neurons of Sequential"):
        group_units(nn.Sequential(nn.Linear(4, 4)))
    with pytest.raises(TypeError, match="must be an nn.Module, found str"):
        group_units("swin")


def test_group_units_refuses_answers_of_another_type(swin):
    with pytest.raises(TypeError, match="must return UnitLayers, found str"):
        group_units(swin, lambda name, module: ["heads"])


def test_group_units_refuses_tied_weights(swin):
    first, second = swin.layers[0].blocks
    second.mlp.fc1.weight = first.mlp.fc1.weight
    with pytest.raises(ValueError, match="weight of a Linear in layers.0.blocks.0.mlp is used"):
        group_units(swin)


def test_a_class_with_a_forward_of_its_own_is_not_taken_for_its_parent(swin):
    class Attention(type(swin.layers[0].blocks[0].attn)):
        def forward(self, x, mask=None):
            return super().forward(x, mask).flip(0)

    swin.layers[0].blocks[0].attn.__class__ = Attention
    with pytest.warns(UserWarning, match="heads of Attention, a class that is not known"):
        assert len(group_units(swin)["heads"]) == 3


def test_a_class_of_ones_own_is_described_by_a_rule(images):
    class Gate(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(16, 24, bias=False), nn.Linear(24, 16)

        def forward(self, x):
            return x + self.down(self.up(x).relu())

    def rule(name, module):
        from torch_dimap.units import Part

        if isinstance(module, Gate):
            parts = (Part(module.up, "weight", 0, 1, 1), Part(module.down, "weight", 1, 1, 1))
            yield UnitLayer(name, "gates", 24, module, parts, (), module.down)

    torch.manual_seed(0)
    model = nn.Sequential(Gate(), Gate())
    units = group_units(model, rule)
    global_module_aware_structured(units, 0.5)
    expected = model(images)
    remove_units(model, rule)
    assert model[0].up.out_features + model[1].down.in_features == 24
    torch.testing.assert_close(model(images), expected)

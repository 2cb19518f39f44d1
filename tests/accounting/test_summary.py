"""The table by hand on a small network, and Table 1 of the paper on the real ones."""

from __future__ import annotations

import copy
import csv
import json

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from torch_dimap import (
    count_flops,
    global_module_aware_structured,
    group_parameters,
    group_units,
    remove_all,
    remove_units,
    summarize,
)


def small() -> tuple[nn.Sequential, dict[str, list]]:
    """4 -> 3 -> 2: the first layer loses an output and an input, the second half."""
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    first = torch.tensor([[1.0, 1, 1, 0], [0, 0, 0, 0], [0, 1, 1, 0]])
    second = torch.tensor([[1.0, 0, 0], [1, 1, 0]])
    for layer, mask in ((model[0], first), (model[2], second)):
        nn.init.ones_(layer.weight)
        prune.custom_from_mask(layer, "weight", mask)
    return model, {"a": [(model[0], "weight")], "b": [(model[2], "weight")]}


def test_summarize_counts_weights_zeros_and_dead_rows_and_columns():
    model, groups = small()
    summary = summarize(model, parameters=groups)
    first, second = summary.layers
    assert first == ("layer", "0.weight", 12, 7, 1, 1, "a", (3, 4), *[None] * 5)
    assert second == ("layer", "2.weight", 6, 3, 0, 1, "b", (2, 3), *[None] * 5)
    assert [row[:6] for row in summary.groups] == [
        ("group", "a", 12, 7, 1, 1),
        ("group", "b", 6, 3, 0, 1),
    ]
    assert summary.prunable[:6] == ("total", "prunable", 18, 10, 1, 2)
    assert summary.model[:6] == ("total", "model", 18 + 3 + 2, 10, 1, 2)
    assert (first.density, second.density) == (pytest.approx(5 / 12), 0.5)


def test_summarize_gives_shares_of_the_prunable_weights_and_of_all():
    model, groups = small()
    record = summarize(model, parameters=groups).to_dict()["layers"][0]
    assert record["share_of_prunable"] == 12 / 18 and record["share_of_all"] == 12 / 23
    assert record["dense_flops"] is record["masked_flops"] is record["share_of_flops"] is None


def test_summarize_counts_flops_when_given_inputs():
    model, groups = small()
    summary = summarize(model, torch.zeros(10, 4), groups)
    assert [row.flops for row in summary.layers] == [(120, 50, 50), (60, 30, 30)]
    assert summary.prunable.flops == summary.model.flops == (180, 80, 80)
    assert summary.to_dict()["groups"][0]["share_of_flops"] == 120 / 180


def test_summarize_gives_the_same_for_masked_and_baked():
    model, groups = small()
    masked = summarize(model, torch.zeros(1, 4), groups)
    assert summarize(remove_all(model), torch.zeros(1, 4), groups) == masked


def test_summarize_reads_the_mask_and_not_a_stale_weight():
    model, groups = small()
    model[0].weight_mask.fill_(1)
    assert summarize(model, parameters=groups).layers[0].zeros == 0


def test_summarize_looks_at_convolutions_by_channel():
    model = nn.Conv2d(3, 2, 2)
    with torch.no_grad():
        model.weight.fill_(1)[:, 1] = 0
        model.weight[0, 0, 0, 0] = 0
    (row,) = summarize(model, parameters=[(model, "weight")]).layers
    assert (row.zeros, row.dead_rows, row.dead_columns, row.shape) == (9, 0, 1, (2, 3, 2, 2))


def test_summarize_takes_vectors():
    model = nn.LayerNorm(4)
    with torch.no_grad():
        model.weight[1] = 0
    (row,) = summarize(model, parameters=[(model, "weight")]).layers
    assert (row.zeros, row.dead_rows, row.dead_columns) == (1, 1, 0)


def test_summarize_prints_an_aligned_table():
    model, groups = small()
    lines = str(summarize(model, parameters=groups, thresholds={"a": 1.25e-7})).splitlines()
    rule = "-" * len(lines[0])
    assert lines == [
        "layer     group  shape  weights  of prunable  of params  zeros  density  threshold"
        "  dead rows  dead cols",
        rule,
        "0.weight  a      3x4         12       66.67%     52.17%      7   0.4167           "
        "          1          1",
        "2.weight  b      2x3          6       33.33%     26.09%      3   0.5000           "
        "          0          1",
        rule,
        "a                            12       66.67%     52.17%      7   0.4167   1.25e-07"
        "          1          1",
        "b                             6       33.33%     26.09%      3   0.5000           "
        "          0          1",
        rule,
        "prunable                     18      100.00%     78.26%     10   0.4444           "
        "          1          2",
        "model                        23                 100.00%     10   0.5652           "
        "          1          2",
    ]


def test_summarize_prints_at_most_120_columns_and_says_what_is_left_out():
    model, groups = small()
    deep = nn.Sequential(nn.ModuleDict({"a_long_name_" * 9: model}))
    deep.forward = lambda x: model(x)
    text = str(summarize(deep, torch.zeros(1_000_000, 4), groups, thresholds={"a": 1.25e-7}))
    lines = text.splitlines()
    assert max(map(len, lines)) <= 120
    assert lines[2].startswith("0.a_long_name_a_long_n…a_long_name_.0.weight  a ")
    assert lines[0].split()[:6] == ["layer", "group", "shape", "weights", "density", "threshold"]
    assert "dense MFLOPs  masked MFLOPs" in lines[0]
    assert "inputs of 1000000x4" in text and "theoretical: dense kernels do not run" in text
    assert "not shown, in to_markdown() and to_csv(): of params, of FLOPs" in lines[-1]


def test_a_notebook_shows_groups_first_and_layers_to_unfold():
    model, groups = small()
    model = nn.Sequential(nn.ModuleDict({"<b>": model}))
    shown = summarize(model, parameters=groups, thresholds={"a": 1.25e-7})._repr_html_()
    first, _, unfolded = shown.partition("<details><summary>2 layers</summary>")
    assert first.count("<tr>") == 1 + 2 + 2 and unfolded.count("<tr>") == 1 + 2
    assert "<td>a</td><td>12</td><td>0.4167</td><td>1.25e-07</td>" in first
    assert "0.&lt;b&gt;.0.weight" in unfolded and "<b>" not in shown


@pytest.mark.parametrize(
    "inputs", [{"x": torch.zeros(10, 4), "scale": 2}, (10, 4), torch.Size([10, 4])]
)
def test_summarize_takes_arguments_by_name_and_shapes(inputs):
    model, groups = small()

    class Scaled(nn.Sequential):
        def forward(self, x, scale=1):
            return super().forward(x * scale)

    model = Scaled(*model)
    groups = {"a": [(model[0], "weight")], "b": [(model[2], "weight")]}
    expected = summarize(model, torch.zeros(10, 4), groups)
    assert summarize(model, inputs, groups) == expected
    assert "forward" not in vars(model)


def test_summarize_takes_a_processors_dict_for_transformers():
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(hidden_size=24, num_hidden_layers=1, num_attention_heads=2,
                                    intermediate_size=48, image_size=16, patch_size=4)  # fmt: skip
    model = transformers.ViTModel(config)
    images = torch.zeros(1, 3, 16, 16)
    by_name = {"pixel_values": images, "bool_masked_pos": None, "interpolate_pos_encoding": False}
    assert count_flops(model, by_name) == count_flops(model, images)


def test_summarize_without_inputs_says_nothing_of_flops():
    model, groups = small()
    assert "FLOPs" not in str(summarize(model, parameters=groups))


def test_to_markdown_has_a_cell_for_every_column():
    model, groups = small()
    lines = summarize(model, torch.zeros(1, 4), groups).to_markdown().splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert len(table) == 2 + 2 + 2 + 2 and len({line.count("|") for line in table}) == 1
    assert table[2].startswith("| 0.weight | a | 3x4 | 12 | 66.67% |")
    assert "theoretical: dense kernels do not run faster" in "\n".join(lines)


def test_to_csv_holds_what_to_dict_holds(tmp_path):
    model, groups = small()
    summary = summarize(model, torch.zeros(10, 4), groups)
    text = summary.to_csv(tmp_path / "table.csv")
    assert (tmp_path / "table.csv").read_text() == text
    rows = list(csv.DictReader(text.splitlines()))
    assert [row["name"] for row in rows] == ["0.weight", "2.weight", "a", "b", "prunable", "model"]
    assert rows[0]["shape"] == "3x4" and rows[0]["masked_flops"] == "50"
    assert rows[0]["threshold"] == "" and rows[-1]["share_of_prunable"] == ""
    assert list(rows[0]) == list(summary.to_dict()["model"])


def test_to_dict_goes_through_json():
    model, groups = small()
    data = summarize(model, torch.zeros(10, 4), groups).to_dict()
    assert json.loads(json.dumps(data)) == data


def test_summarize_refuses_thresholds_of_other_groups():
    model, groups = small()
    with pytest.raises(ValueError, match=r"for the groups \['a', 'b'\], found 'qkv'"):
        summarize(model, parameters=groups, thresholds={"qkv": 0.1})
    with pytest.raises(TypeError, match="mapping group -> threshold.*found float"):
        summarize(model, parameters=groups, thresholds=0.1)


def test_summarize_rounds_uniform_flops_once_and_not_layer_by_layer():
    net = nn.Sequential(*(nn.Linear(3, 3, bias=False) for _ in range(3)))
    parameters = {"all": [(layer, "weight") for layer in net]}
    for layer, left in zip(net, (6, 6, 4)):
        prune.l1_unstructured(layer, "weight", amount=9 - left)
    table = summarize(net, torch.zeros(1, 3), parameters)
    assert [row.flops.uniform for row in table.layers] == [5, 5, 5]
    assert table.groups[0].flops == table.prunable.flops == table.model.flops == (27, 16, 16)


def test_summarize_refuses_the_tensor_behind_a_mask():
    net, _ = small()
    prune.l1_unstructured(net[0], "weight", amount=0.5)
    with pytest.raises(ValueError, match="behind a mask: name the pruned tensor, 'weight'"):
        summarize(net, parameters=[(net[0], "weight_orig")])


@pytest.fixture
def masked_units(swin):
    """A Swin with dead heads and neurons, and a weight more, zero, in a neuron that lives."""
    done = global_module_aware_structured(group_units(swin), 0.5, multiple=1, minimum=0)
    return swin, {**done["heads"].kept, **done["neurons"].kept}


def test_summarize_tells_how_many_units_each_layer_has_left(masked_units):
    swin, kept = masked_units
    dense = {"heads": 2 + 2 + 4 + 4, "neurons": 2 * 64 + 2 * 128}
    for model in (swin, remove_units(copy.deepcopy(swin))):
        summary = summarize(model)
        for row in summary.layers:
            assert row.units_kept == kept[row.name.rsplit(".", 2)[0]]
            assert row.units in (2, 4, 64, 128)
        assert {row.name: (row.units, row.units_kept) for row in summary.groups} == {
            "qkv": (dense["heads"], dense["heads"] // 2),
            "proj": (dense["heads"], dense["heads"] // 2),
            "mlp": (dense["neurons"], dense["neurons"] // 2),
        }
        assert summary.prunable.units is summary.model.units is None


def test_summarize_counts_what_removal_leaves_beside_what_masks_leave(masked_units, images):
    swin, _ = masked_units
    slim = count_flops(remove_units(copy.deepcopy(swin)), images)
    before = [(p, p.shape) for p in swin.parameters()], {m: type(m) for m in swin.modules()}
    summary = summarize(swin, images)
    assert summary.model.slim_flops == slim.dense < summary.model.flops.dense
    assert {row.name: row.slim_flops for row in summary.layers} == {
        name: flops.dense for name, flops in slim.layers.items()
    }
    assert sum(row.slim_flops for row in summary.groups) == summary.prunable.slim_flops
    assert "slim MFLOPs" in str(summary) and "counted with the dead units cut out" in summary.note
    # The model that was cut for the count is whole again.
    assert before[0] == [(p, p.shape) for p in swin.parameters()]
    assert before[1] == {m: type(m) for m in swin.modules()}
    assert summarize(swin, images) == summary


def test_summarize_of_a_slim_model_counts_it_as_it_is(masked_units, images):
    slim = remove_units(masked_units[0])
    summary = summarize(slim, images)
    assert summary.model.slim_flops == summary.model.flops.dense


def test_summarize_says_nothing_of_units_where_none_has_gone(swin, images):
    summary = summarize(swin, images)
    assert "units" not in str(summary) and "slim" not in str(summary)
    assert all(row.units is row.slim_flops is None for row in (*summary.layers, summary.model))


def test_summarize_does_not_add_heads_to_neurons(masked_units):
    swin, _ = masked_units
    pairs = [pair for members in group_parameters(swin).values() for pair in members]
    (group,) = summarize(swin, parameters=pairs).groups
    assert group.units is group.units_kept is None

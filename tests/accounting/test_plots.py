"""What the pictures show, read back from the figures."""

from __future__ import annotations

import copy
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import make_vit
from torch import nn
from torch.nn.utils import prune

from torch_dimap import (
    global_module_aware_structured,
    global_module_aware_unstructured,
    group_units,
    plot_density,
    plot_histograms,
    plot_masks,
    plot_units,
    remove_all,
    remove_units,
)

pytest.importorskip("matplotlib", reason="plots need matplotlib")
from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: E402


def ladder(blocks: int, width: int = 8) -> tuple[nn.Sequential, dict[str, list]]:
    """Blocks of two layers, the groups in another order than the model."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(2 * blocks)))
    for i, layer in enumerate(model):
        layer.weight.data.normal_(std=1 + i, generator=generator)
    pairs = [(layer, "weight") for layer in model]
    return model, {"odd": pairs[1::2], "even": pairs[::2]}


def overlaps(figure) -> list[tuple[str, str]]:
    """Draw a figure and name the texts that run into each other or out of it."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    texts = [legend.get_window_extent(renderer) for legend in figure.legends]
    names = ["legend"] * len(texts)
    for axes in figure.axes:
        for text in (axes.title, axes.xaxis.label, axes.yaxis.label):
            if text.get_text():
                texts.append(text.get_window_extent(renderer))
                names.append(text.get_text())
        texts.append(axes.get_window_extent(renderer))
        names.append("panel")
    outside = [
        (name, "edge")
        for name, box in zip(names, texts)
        if box.x0 < -1 or box.y0 < -1 or box.x1 > figure.bbox.x1 + 1 or box.y1 > figure.bbox.y1 + 1
    ]
    pairs = [(i, j) for i in range(len(texts)) for j in range(i)]
    return outside + [(names[i], names[j]) for i, j in pairs if texts[i].overlaps(texts[j])]


def test_plot_density_draws_each_layer_at_its_place_in_the_model():
    model, groups = ladder(2)
    for layer, kept in zip(model, (64, 48, 32, 16)):
        prune.l1_unstructured(layer, "weight", amount=64 - kept)
    (axes,) = plot_density(model, groups).axes
    lines = {line.get_label(): line for line in axes.lines}
    assert lines["even"].get_xdata().tolist() == [1, 3]
    assert lines["even"].get_ydata().tolist() == [1.0, 0.5]
    assert lines["odd"].get_xdata().tolist() == [2, 4]
    assert lines["odd"].get_ydata().tolist() == [0.75, 0.25]
    assert lines["all prunable weights, 0.625"].get_ydata()[0] == 0.625
    assert [text.get_text() for text in axes.get_xticklabels()] == [f"{i}.weight" for i in range(4)]


def test_plot_density_names_the_thresholds_in_the_legend():
    model, groups = ladder(2)
    thresholds = global_module_aware_unstructured(groups, amount=0.5)
    (legend,) = plot_density(model, groups, thresholds).legends
    texts = [text.get_text() for text in legend.get_texts()]
    assert f"odd, threshold {thresholds['odd']:.2e}" in texts and len(texts) == 3


def test_plot_density_refuses_thresholds_of_other_groups():
    model, groups = ladder(2)
    with pytest.raises(ValueError, match=r"plot_density.*\['even', 'odd'\], found 'qkv'"):
        plot_density(model, groups, {"qkv": 0.1})
    with pytest.raises(TypeError, match="plot_density.*mapping group -> threshold.*found float"):
        plot_density(model, groups, 0.1)


@pytest.mark.parametrize("blocks", [4, 112])
def test_plot_density_keeps_its_texts_apart(blocks):
    model, groups = ladder(blocks, width=4)
    thresholds = global_module_aware_unstructured(groups, amount=0.5)
    assert overlaps(plot_density(model, groups, thresholds)) == []


def test_plot_density_does_not_list_a_hundred_groups():
    model, groups = ladder(50, width=2)
    each = {str(i): [pair] for i, pair in enumerate(groups["odd"] + groups["even"])}
    figure = plot_density(model, each)
    assert not figure.legends and figure.axes[0].get_title() == "100 groups"


def test_plot_histograms_draws_kept_on_pruned_and_the_cut():
    model, groups = ladder(1)
    with torch.no_grad():
        model[0].weight.copy_(torch.arange(-32.0, 32).view(8, 8))
    prune.l1_unstructured(model[0], "weight", amount=21)  # -10 to 10
    (axes,) = plot_histograms(model, ["0.weight"], groups).axes
    counts = [sum(bar.get_height() for bar in bars) for bars in axes.containers]
    assert counts[0] == 21 and counts[1] >= 64 - 21 - 1  # one in a thousand may be outside
    assert [line.get_xdata()[0] for line in axes.lines] == [-10, 10]
    assert axes.get_title() == "0.weight\ndensity 0.672, cut at ±10"
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("weight", "weights per bin")


def test_plot_histograms_of_a_baked_layer_shows_what_is_left():
    model, groups = ladder(1)
    prune.l1_unstructured(model[0], "weight", amount=0.5)
    (axes,) = plot_histograms(remove_all(model), ["0.weight"], groups).axes
    smallest = model[0].weight[model[0].weight != 0].abs().min().item()
    assert axes.lines[1].get_xdata()[0] == pytest.approx(smallest)
    assert sum(bar.get_height() for bar in axes.containers[0]) == 0


def test_plot_histograms_draws_no_cut_where_there_is_none():
    model, groups = ladder(1)
    prune.random_unstructured(model[0], "weight", amount=0.5)
    figure = plot_histograms(model, ["0.weight", "1.weight"], groups)
    assert [len(axes.lines) for axes in figure.axes] == [0, 0]
    assert "cut" not in [text.get_text() for text in figure.legends[0].get_texts()]


def test_plot_masks_draws_the_mask():
    model, groups = ladder(1)
    prune.random_unstructured(model[0], "weight", amount=0.4)
    axes, _ = plot_masks(model, ["0.weight"], groups).axes  # the second is the colour bar
    np.testing.assert_array_equal(axes.images[0].get_array(), model[0].weight_mask.numpy())
    assert axes.get_title() == "0.weight\neven, density 0.594"


def test_plot_masks_bins_a_large_layer_to_its_density():
    model = nn.Linear(100, 1000, bias=False)
    mask = torch.zeros(1000, 100)
    mask[:2] = 1  # half of the first four rows
    mask[-1, :50] = 1
    prune.custom_from_mask(model, "weight", mask)
    axes, _ = plot_masks(model, parameters=[(model, "weight")]).axes
    cells = axes.images[0].get_array()
    assert cells.shape == (250, 100)
    assert (cells[0] == 0.5).all() and (cells[1:-1] == 0).all()
    assert cells[-1].tolist() == [0.25] * 50 + [0.0] * 50
    assert "one cell: 4 x 1 weights" in axes.get_title()


def test_plot_masks_weighs_a_smaller_last_block_by_its_size():
    model = nn.Linear(1, 257, bias=False)  # blocks of two, and one of one
    nn.init.ones_(model.weight)
    axes, _ = plot_masks(model, parameters=[(model, "weight")]).axes
    assert axes.images[0].get_array().shape == (129, 1) and axes.get_ylim() == (257, 0)
    assert (axes.images[0].get_array() == 1).all()


@pytest.mark.parametrize("draw", [plot_histograms, plot_masks])
def test_plots_of_layers_take_the_first_four_and_keep_their_texts_apart(draw):
    model, groups = ladder(4)
    global_module_aware_unstructured(groups, amount=0.5)
    figure = draw(model, parameters=groups)
    titles = [axes.get_title().splitlines()[0] for axes in figure.axes if axes.get_title()]
    assert titles == [f"{i}.weight" for i in range(4)]
    assert overlaps(figure) == []


@pytest.mark.parametrize("draw", [plot_histograms, plot_masks])
def test_plots_refuse_layers_that_are_not_there(draw):
    model, groups = ladder(3)
    with pytest.raises(ValueError, match="among 0.weight, 1.weight, 2.weight and 3 more, found '9"):
        draw(model, ["9.weight"], groups)
    with pytest.raises(ValueError, match="found none"):
        draw(model, [], groups)
    with pytest.raises(TypeError, match="a sequence of names, found int"):
        draw(model, 3, groups)
    assert len(draw(model, "0.weight", groups).axes[0].get_title().splitlines()) == 2


def test_plot_density_draws_a_line_between_stages(swin):
    (axes,) = plot_density(swin).axes
    ends = [line.get_xdata()[0] for line in axes.lines if line.get_label() == "between stages"]
    assert ends == [2 * 4 + 0.5]  # two blocks of four layers each in the first stage
    one_stage = plot_density(make_vit()).axes[0]
    assert not [line for line in one_stage.lines if line.get_label() == "between stages"]


def test_what_is_gone_has_one_colour(swin):
    masks, bars = plot_masks(swin).axes[0].images[0], plot_histograms(swin).axes[0].patches[0]
    assert masks.cmap(0.0)[:3] == pytest.approx(bars.get_facecolor()[:3])


def test_plots_take_half_precision_convolutions_and_vectors():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.LayerNorm(4)).bfloat16()
    pairs = [(model[0], "weight"), (model[1], "weight")]
    for draw in (plot_histograms, plot_density, plot_masks):
        FigureCanvasAgg(draw(model, parameters=pairs)).draw()


def test_plots_leave_pyplot_alone():
    """No figure may stay in memory, and no display is asked for."""
    code = (
        "import sys, torch_dimap as td; from torch import nn; m = nn.Linear(4, 4); "
        "assert 'matplotlib' not in sys.modules; "
        "td.plot_density(m, [(m, 'weight')]); assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_plots_without_matplotlib_say_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    model, groups = ladder(1)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        plot_density(model, groups)


def test_plot_units_draws_what_layers_have_left_masked_or_slim(swin):
    done = global_module_aware_structured(group_units(swin), 0.5, multiple=1, minimum=0)
    for model in (swin, remove_units(copy.deepcopy(swin))):
        figure = plot_units(model)
        (axes,) = figure.axes
        names = [text.get_text() for text in axes.get_xticklabels()]
        for kind, dense in (("heads", [2, 2, 4, 4]), ("neurons", [64, 64, 128, 128])):
            (line,) = (x for x in axes.lines if x.get_label().startswith(kind))
            assert line.get_label() == f"{kind}, {sum(dense) // 2} of {sum(dense)}"
            kept = {names[x - 1]: y for x, y in zip(line.get_xdata(), line.get_ydata())}
            left = done[kind].kept
            assert kept == {name: left[name] / of for name, of in zip(left, dense)}
        assert not overlaps(figure)


def test_plot_units_of_a_model_without_known_units_says_so():
    with pytest.raises(ValueError, match="no heads or neurons of Linear are known: pass rule="):
        plot_units(nn.Linear(2, 2))

"""The paper's pictures of a pruned model, for any model, and one of its units.

Every function returns a :class:`matplotlib.figure.Figure`; none shows or saves it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from torch_dimap.accounting.canvas import (
    GONE,
    add_legend,
    colours_of,
    draw_fractions,
    gone_to_kept,
    name_groups,
    panels_of,
)
from torch_dimap.accounting.thresholds import check_thresholds
from torch_dimap.masking import Layer, Parameters, find_layers_in
from torch_dimap.sharding import whole_of
from torch_dimap.units import UnitRule, count_units

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Up to the number of the stage, in names with a block's number after it: layers.0 of
# layers.0.blocks.1.attn.qkv. A number inside an attention or an MLP is none of a block.
_STAGE = re.compile(
    r"(.*?\.)??\d+(?=\.((?!\w*(attn|attention|mlp|ffn|output|intermediate))\w+\.)?\d+\.)"
)
_BINS = 81
_QUANTILE = 0.999  # what lies beyond would squeeze the rest into a few bins
_CELLS = 256  # of an image, each way: as many as a panel has pixels for


def plot_histograms(
    model: nn.Module,
    layers: str | Sequence[str] | None = None,
    parameters: Parameters | None = None,
) -> Figure:
    """Draw how the weights of some layers are distributed, and where they are cut.

    A masked layer shows the weights behind its mask as pruned; a baked one has lost
    them and shows those that are not zero. The cut is drawn where there is one, that is,
    if all that went is smaller in magnitude than all that stayed.

    Args:
        model: the model; it is only read.
        layers: name of a layer's tensor, as :func:`torch_dimap.summarize` gives it, or
            several of them. Default: the first four of the model, its first block as a rule.
        parameters: group -> ``(module, name)`` pairs, or pairs alone. Default:
            ``group_parameters(model)``.

    Returns:
        A figure with a panel for each layer. Axes: weight; weights per bin. One weight
        in a thousand, the largest, lies beyond the axis.

    Raises:
        TypeError, ValueError: for names or parameters that do not fit the model.
        ImportError: if matplotlib is not installed.

    Source: He and Zhou, ICLR 2024, Fig. 2.
    """
    chosen = _choose(model, layers, parameters, "plot_histograms()")
    figure, panels = panels_of(len(chosen), width=4.2, height=3.0)
    legend: dict[str, Any] = {}
    line = None
    for (group, layer, colour), axes in zip(chosen, panels):
        values, kept, cut = _values(layer)
        reach = float(np.quantile(np.abs(values), _QUANTILE)) if values.size else 0.0
        edges = np.linspace(-reach or -1.0, reach or 1.0, _BINS + 1).tolist()
        bars: Any = axes.hist(
            [values[~kept], values[kept]], bins=edges, stacked=True, color=[GONE, colour]
        )[2]
        legend.update({"pruned": bars[0], f"kept, {group}": bars[1]})
        for side in () if cut is None else (-cut, cut):
            line = axes.axvline(side, color="black", linestyle="--", linewidth=1)
        where = "" if cut is None else f", cut at ±{cut:.2g}"
        _title(axes, layer, f"density {_density(layer):.3f}{where}")
        axes.set(xlabel="weight", ylabel="weights per bin")
        axes.margins(x=0)
        axes.locator_params(axis="x", nbins=5)
    if line is not None:
        legend["cut"] = line
    add_legend(figure, list(legend.values()), list(legend))
    return figure


def plot_density(
    model: nn.Module,
    parameters: Parameters | None = None,
    thresholds: Mapping[str, float] | None = None,
) -> Figure:
    """Draw the fraction of weights that every layer keeps, in the order of the model.

    Args:
        model: the model; it is only read.
        parameters: group -> ``(module, name)`` pairs, or pairs alone. Default:
            ``group_parameters(model)``.
        thresholds: group -> threshold for the legend, as the pruning call returned them.

    Returns:
        A figure with a point for each layer, coloured by group, and a line between stages.
        Axes: layer; density.

    Raises:
        TypeError, ValueError: for parameters that do not fit the model, and thresholds
            that do not fit its groups.
        ImportError: if matplotlib is not installed.

    Source: He and Zhou, ICLR 2024, Fig. 5.
    """
    layers = _in_order(model, parameters, "plot_density()")
    colours = {group: colour for group, _, colour in layers}
    check_thresholds(thresholds, colours, "plot_density()")
    known = thresholds or {}
    labels = {
        group: f"{group}, threshold {known[group]:.2e}" if group in known else group
        for group in colours
    }
    density = [_density(layer) for _, layer, _ in layers]
    points = [(group, layer.label, d) for (group, layer, _), d in zip(layers, density)]
    figure, axes = draw_fractions(points, colours, labels)
    sizes = [layer.parameter.numel() for _, layer, _ in layers]
    mean = float(np.average(density, weights=sizes)) if sum(sizes) else 0.0
    axes.axhline(mean, color="0.4", linestyle=":", label=f"all prunable weights, {mean:.3f}")
    for i, label in zip(_stage_ends(layers), ["between stages", *["_"] * len(layers)]):
        axes.axvline(i + 0.5, color="0.8", linewidth=0.8, zorder=0, label=label)
    axes.set(ylabel="density (fraction of weights kept)")
    name_groups(figure, axes, len(colours))
    return figure


def plot_units(model: nn.Module, rule: UnitRule | None = None) -> Figure:
    """Draw the fraction of its heads or neurons that every layer keeps, in order.

    Units count as gone if they have been removed, or if they are dead: if masks or zeros
    leave nothing of them to be read.

    Args:
        model: masked, slim or both; it is only read.
        rule: as for :func:`torch_dimap.group_units`.

    Returns:
        A figure with a point for each layer, coloured by the kind of its units, and with
        their numbers in the legend. Axes: layer; fraction of units.

    Raises:
        ValueError: if no units of the model are known.
        ImportError: if matplotlib is not installed.
    """
    counts = [(count, count.alive) for count in count_units(model, rule)]
    if not counts:
        raise ValueError(
            f"plot_units(): no heads or neurons of {type(model).__name__} are known: pass rule= "
            "to describe the units of your own classes."
        )
    kinds = list(dict.fromkeys(count.kind for count, _ in counts))
    labels = {}
    for kind in kinds:
        own = [(alive, count.dense) for count, alive in counts if count.kind == kind]
        alive, dense = map(sum, zip(*own))
        labels[kind] = f"{kind}, {alive:,} of {dense:,}"
    points = [(count.kind, count.name, alive / count.dense) for count, alive in counts]
    figure, axes = draw_fractions(points, dict(zip(kinds, colours_of(len(kinds)))), labels)
    axes.set(ylabel="fraction of units kept")
    name_groups(figure, axes, len(kinds))
    return figure


def plot_masks(
    model: nn.Module,
    layers: str | Sequence[str] | None = None,
    parameters: Parameters | None = None,
) -> Figure:
    """Draw which weights of some layers are left, as images.

    A layer with more rows or columns than a panel can show is drawn by the density of
    blocks of weights: nothing is left out, as it would be by taking every n-th.

    Args:
        model: the model; it is only read.
        layers: as in :func:`plot_histograms`.
        parameters: as in :func:`plot_histograms`.

    Returns:
        A figure with a panel for each layer. Axes: column of the weight (input), with
        the kernel's positions of a convolution side by side; row (output).

    Raises:
        TypeError, ValueError: for names or parameters that do not fit the model.
        ImportError: if matplotlib is not installed.

    Source: He and Zhou, ICLR 2024, Fig. 6.
    """
    chosen = _choose(model, layers, parameters, "plot_masks()")
    figure, panels = panels_of(len(chosen), width=6.0, height=5.4)
    for (group, layer, _), axes in zip(chosen, panels):
        alive = (whole_of(layer.weight) != 0).cpu()
        alive = alive.flatten(1) if alive.dim() > 1 else alive.reshape(-1, 1)
        rows, columns = alive.shape
        block = math.ceil(rows / _CELLS), math.ceil(columns / _CELLS)
        cells = _binned(alive.numpy(), block)
        extent = (0, cells.shape[1] * block[1], cells.shape[0] * block[0], 0)
        image = axes.imshow(
            cells, cmap=gone_to_kept(), vmin=0, vmax=1, aspect="auto", extent=extent
        )
        axes.set(xlim=(0, columns), ylim=(rows, 0))  # the last blocks may reach beyond
        note = "" if block == (1, 1) else f", one cell: {block[0]} x {block[1]} weights"
        _title(axes, layer, f"{group}, density {_density(layer):.3f}{note}")
        axes.set(xlabel="input (column)", ylabel="output (row)")
        axes.locator_params(nbins=6)
    figure.colorbar(image, ax=panels, label="fraction of weights kept", shrink=0.8)
    return figure


def _stage_ends(layers: list[tuple[str, Layer, Any]]) -> list[int]:
    """Return after how many layers a stage ends and another begins."""
    stages = [match and match[0] for match in (_STAGE.match(x.label) for _, x, _ in layers)]
    return [i for i in range(1, len(stages)) if None not in (a := stages[i - 1 : i + 1])
            and a[0] != a[1]]  # fmt: skip


def _title(axes: Axes, layer: Layer, note: str) -> None:
    axes.set_title(f"{layer.label}\n{note}", fontsize="small")


def _in_order(
    model: nn.Module, parameters: Parameters | None, caller: str
) -> list[tuple[str, Layer, Any]]:
    """Return group, layer and colour of all layers, in the order of the model."""
    groups = find_layers_in(model, parameters, caller)
    place = {module: i for i, module in enumerate(model.modules())}
    colours = dict(zip(groups, colours_of(len(groups))))
    listed = [(group, layer, colours[group]) for group in groups for layer in groups[group]]
    if not listed:
        raise ValueError(f"{caller}: parameters lists no layer, so there is nothing to draw.")
    return sorted(listed, key=lambda entry: place[entry[1].module])


def _choose(
    model: nn.Module, names: str | Sequence[str] | None, parameters: Parameters | None, caller: str
) -> list[tuple[str, Layer, Any]]:
    layers = _in_order(model, parameters, caller)
    if names is None:
        return layers[:4]
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, Sequence):
        raise TypeError(
            f"{caller}: layers must be a name or a sequence of names, found "
            f"{type(names).__name__}."
        )
    by_name = {entry[1].label: entry for entry in layers}
    unknown = [name for name in names if name not in by_name]
    if unknown or not names:
        known = ", ".join(list(by_name)[:3])
        more = f" and {len(by_name) - 3} more" if len(by_name) > 3 else ""
        found = repr(unknown[0]) if unknown else "none"
        raise ValueError(f"{caller}: layers must be among {known}{more}, found {found}.")
    return [by_name[name] for name in names]


def _density(layer: Layer) -> float:
    return int(whole_of(layer.weight).count_nonzero()) / max(1, layer.parameter.numel())


def _values(layer: Layer) -> tuple[np.ndarray, np.ndarray, float | None]:
    """Return a layer's weights, which of them are kept, and the magnitude of the cut."""
    weight = whole_of(layer.parameter.detach()).flatten().float().cpu().numpy()
    if layer.mask is None:
        kept = weight != 0  # what baking has set to zero can only be told to be small
        weight, gone = weight[kept], not kept.all()
        cut = float(np.abs(weight).min()) if gone and weight.size else None
        return weight, np.ones(weight.shape, dtype=bool), cut
    kept = (whole_of(layer.mask) != 0).flatten().cpu().numpy()
    if kept.all() or not kept.any():
        return weight, kept, None
    cut = float(np.abs(weight[~kept]).max())
    return weight, kept, cut if cut <= np.abs(weight[kept]).min() else None


def _binned(alive: np.ndarray, block: tuple[int, int]) -> np.ndarray:
    """Return the density of every block of a matrix; the last ones may be smaller."""
    sums, sizes = alive.astype(np.float64), np.ones((1, 1))
    for axis, (length, step) in enumerate(zip(alive.shape, block)):
        starts = np.arange(0, length, step)
        sums = np.add.reduceat(sums, starts, axis=axis)
        sizes = sizes * np.expand_dims(np.diff(starts, append=length), 1 - axis)
    return sums / sizes

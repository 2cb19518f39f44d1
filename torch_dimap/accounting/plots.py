"""The paper's pictures of a pruned model, for any model; the only file that knows matplotlib.

Every function returns a :class:`matplotlib.figure.Figure`; none shows or saves it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from torch_dimap.accounting.thresholds import check_thresholds
from torch_dimap.masking import Layer, Parameters, find_layers_in

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_BINS = 81
_QUANTILE = 0.999  # what lies beyond would squeeze the rest into a few bins
_CELLS = 256  # of an image, each way: as many as a panel has pixels for
_NAMED = 24  # layers whose names fit below an axis
_COLOURS = 10  # that can be told apart, and listed in a legend
_GREY = "0.75"


def plot_histograms(
    model: nn.Module,
    layers: Sequence[str] | None = None,
    parameters: Parameters | None = None,
) -> Figure:
    """Draw how the weights of some layers are distributed, and where they are cut.

    A masked layer shows the weights behind its mask as pruned; a baked one has lost
    them and shows those that are not zero. The cut is drawn where there is one, that is,
    if all that went is smaller in magnitude than all that stayed.

    Args:
        model: the model; it is only read.
        layers: names of the layers' tensors, as :func:`torch_dimap.summarize` gives
            them. Default: the first four of the model, its first block as a rule.
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
    figure, panels = _panels(len(chosen), width=4.2, height=3.0)
    legend: dict[str, Any] = {}
    line = None
    for (group, layer, colour), axes in zip(chosen, panels):
        values, kept, cut = _values(layer)
        reach = float(np.quantile(np.abs(values), _QUANTILE)) if values.size else 0.0
        edges = np.linspace(-reach or -1.0, reach or 1.0, _BINS + 1).tolist()
        bars: Any = axes.hist(
            [values[~kept], values[kept]], bins=edges, stacked=True, color=[_GREY, colour]
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
    _legend(figure, list(legend.values()), list(legend))
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
        A figure with a point for each layer, coloured by group. Axes: layer; density.

    Raises:
        TypeError, ValueError: for parameters that do not fit the model, and thresholds
            that do not fit its groups.
        ImportError: if matplotlib is not installed.

    Source: He and Zhou, ICLR 2024, Fig. 5.
    """
    layers = _in_order(model, parameters, "plot_density()")
    groups = list(dict.fromkeys(group for group, _, _ in layers))
    check_thresholds(thresholds, groups, "plot_density()")
    density = [_density(layer) for _, layer, _ in layers]
    named = len(layers) <= _NAMED
    names = max(len(layer.label) for _, layer, _ in layers) if named else 0
    width = min(16.0, max(6.4, 0.1 * len(layers)))
    figure, (axes,) = _panels(1, width, height=3.6 + 0.06 * names)
    for group in groups:
        at = [i for i, (own, _, _) in enumerate(layers) if own == group]
        threshold = (thresholds or {}).get(group)
        axes.plot(
            [i + 1 for i in at],
            [density[i] for i in at],
            marker="o",
            markersize=6 if named else 3.5,
            linewidth=0.8,
            color=layers[at[0]][2],
            label=group if threshold is None else f"{group}, threshold {threshold:.2e}",
        )
    sizes = [layer.parameter.numel() for _, layer, _ in layers]
    mean = float(np.average(density, weights=sizes)) if sum(sizes) else 0.0
    axes.axhline(mean, color="0.4", linestyle=":", label=f"all prunable weights, {mean:.3f}")
    axes.set(ylabel="density (fraction of weights kept)", ylim=(-0.03, 1.03))
    axes.grid(axis="y", alpha=0.3)
    if named:
        labels = [layer.label for _, layer, _ in layers]
        axes.set_xticks(range(1, len(layers) + 1), labels, rotation=60, fontsize="small")
        for text in axes.get_xticklabels():
            text.set(horizontalalignment="right", rotation_mode="anchor")
    else:
        axes.set(xlabel="layer, in the order of the model", xlim=(0, len(layers) + 1))
    if len(groups) > _COLOURS:
        axes.set_title(f"{len(groups)} groups", fontsize="medium")
    else:
        _legend(figure, *axes.get_legend_handles_labels())
    return figure


def plot_masks(
    model: nn.Module,
    layers: Sequence[str] | None = None,
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
    figure, panels = _panels(len(chosen), width=4.2, height=3.8)
    for (group, layer, _), axes in zip(chosen, panels):
        alive = (layer.weight != 0).cpu()
        alive = alive.flatten(1) if alive.dim() > 1 else alive.reshape(-1, 1)
        rows, columns = alive.shape
        block = math.ceil(rows / _CELLS), math.ceil(columns / _CELLS)
        cells = _binned(alive.numpy(), block)
        extent = (0, cells.shape[1] * block[1], cells.shape[0] * block[0], 0)
        image = axes.imshow(cells, cmap="cividis", vmin=0, vmax=1, aspect="auto", extent=extent)
        axes.set(xlim=(0, columns), ylim=(rows, 0))  # the last blocks may reach beyond
        note = "" if block == (1, 1) else f", one cell: {block[0]} x {block[1]} weights"
        _title(axes, layer, f"{group}, density {_density(layer):.3f}{note}")
        axes.set(xlabel="input (column)", ylabel="output (row)")
        axes.locator_params(nbins=6)
    figure.colorbar(image, ax=panels, label="fraction of weights kept", shrink=0.8)
    return figure


def _panels(count: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "plots need matplotlib, which is not installed: pip install matplotlib."
        ) from error
    columns = min(count, 4 if count > 6 else 2)
    rows = math.ceil(count / columns)
    size = (columns * width, rows * height + 0.6)  # and a legend above
    figure = Figure(figsize=size, layout="constrained")
    panels = [figure.add_subplot(rows, columns, i + 1) for i in range(count)]
    return figure, panels


def _title(axes: Axes, layer: Layer, note: str) -> None:
    axes.set_title(f"{layer.label}\n{note}", fontsize="small")


def _legend(figure: Figure, handles: Sequence[Any], labels: Sequence[str]) -> None:
    columns = max(1, int(figure.get_figwidth() // 2.6))  # inches that an entry may take
    figure.legend(handles, labels, loc="outside upper center", ncols=columns, fontsize="small")


def _in_order(
    model: nn.Module, parameters: Parameters | None, caller: str
) -> list[tuple[str, Layer, Any]]:
    """Return group, layer and colour of all layers, in the order of the model."""
    groups = find_layers_in(model, parameters, caller)
    place = {module: i for i, module in enumerate(model.modules())}
    colours = dict(zip(groups, _colours(len(groups))))
    listed = [(group, layer, colours[group]) for group in groups for layer in groups[group]]
    if not listed:
        raise ValueError(f"{caller}: parameters lists no layer, so there is nothing to draw.")
    return sorted(listed, key=lambda entry: place[entry[1].module])


def _colours(count: int) -> list[Any]:
    if count <= _COLOURS:
        return [f"C{i}" for i in range(count)]
    return [(0.9 * i / count, 0.3, 0.9 - 0.9 * i / count) for i in range(count)]


def _choose(
    model: nn.Module, names: Sequence[str] | None, parameters: Parameters | None, caller: str
) -> list[tuple[str, Layer, Any]]:
    layers = _in_order(model, parameters, caller)
    if names is None:
        return layers[:4]
    if isinstance(names, str) or not isinstance(names, Sequence):
        raise TypeError(
            f"{caller}: layers must be a sequence of names, found {type(names).__name__}."
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
    return int(layer.weight.count_nonzero()) / max(1, layer.parameter.numel())


def _values(layer: Layer) -> tuple[np.ndarray, np.ndarray, float | None]:
    """Return a layer's weights, which of them are kept, and the magnitude of the cut."""
    weight = layer.parameter.detach().flatten().float().cpu().numpy()
    if layer.mask is None:
        kept = weight != 0  # what baking has set to zero can only be told to be small
        weight, gone = weight[kept], not kept.all()
        cut = float(np.abs(weight).min()) if gone and weight.size else None
        return weight, np.ones(weight.shape, dtype=bool), cut
    kept = (layer.mask != 0).flatten().cpu().numpy()
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

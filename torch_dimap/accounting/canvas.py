"""Figures, panels, legends, and lines of fractions: the only file that knows matplotlib."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

GONE = "0.75"  # the colour of what is pruned, in every picture
_NAMED = 24  # layers whose names fit below an axis
_COLOURS = 10  # that can be told apart, and listed in a legend


def panels_of(count: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    """Return a figure with so many panels, each of a size in inches."""
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


def add_legend(figure: Figure, handles: Sequence[Any], labels: Sequence[str]) -> None:
    """Put a legend above the panels."""
    columns = max(1, int(figure.get_figwidth() // 2.6))  # inches that an entry may take
    figure.legend(handles, labels, loc="outside upper center", ncols=columns, fontsize="small")


def colours_of(count: int) -> list[Any]:
    """Return a colour for each of so many groups."""
    if count <= _COLOURS:
        return [f"C{i}" for i in range(count)]
    return [(0.9 * i / count, 0.3, 0.9 - 0.9 * i / count) for i in range(count)]


def gone_to_kept() -> Any:
    """Return the colours of fractions from none to all that is kept."""
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("gone to kept", [GONE, "C0", "midnightblue"])


def draw_fractions(
    layers: Sequence[tuple[str, str, float]], colours: Mapping[str, Any], labels: Mapping[str, str]
) -> tuple[Figure, Axes]:
    """Draw a point for each layer, in their order, and a line through those of each group.

    Args:
        layers: group, name and fraction of each.
        colours: of the groups, in the order of the legend.
        labels: what the legend calls the groups.

    Returns:
        The figure without its legend, and its only panel.
    """
    named = len(layers) <= _NAMED
    names = [name for _, name, _ in layers]
    width = min(16.0, max(6.4, 0.1 * len(layers)))
    figure, (axes,) = panels_of(1, width, height=3.6 + 0.06 * max(map(len, names)) * named)
    for group, colour in colours.items():
        at = [i for i, (own, _, _) in enumerate(layers) if own == group]
        axes.plot(
            [i + 1 for i in at],
            [layers[i][2] for i in at],
            marker="o",
            markersize=6 if named else 3.5,
            linewidth=0.8,
            color=colour,
            label=labels[group],
        )
    axes.set(ylim=(-0.03, 1.03))
    axes.grid(axis="y", alpha=0.3)
    if named:
        axes.set_xticks(range(1, len(layers) + 1), names, rotation=60, fontsize="small")
        for text in axes.get_xticklabels():
            text.set(horizontalalignment="right", rotation_mode="anchor")
    else:
        axes.set(xlabel="layer, in the order of the model", xlim=(0, len(layers) + 1))
    return figure, axes


def name_groups(figure: Figure, axes: Axes, groups: int) -> None:
    """Give a figure its legend, or where the groups are too many for one, their number."""
    if groups > _COLOURS:
        axes.set_title(f"{groups} groups", fontsize="medium")
    else:
        add_legend(figure, *axes.get_legend_handles_labels())

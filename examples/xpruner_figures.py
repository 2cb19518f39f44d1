"""Pictures of class masks: all of them, one class's units, and where one image's heads look."""

from __future__ import annotations

import argparse
import contextlib
import math
from collections.abc import Iterator

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.figure import Figure
from models import whole_or_not_at_all
from torch import Tensor, nn
from torch.utils.data import Dataset

from torch_dimap.learning import ClassMasks
from torch_dimap.units import UnitLayer

matplotlib.use("Agg")
BEST = 20  # units in the picture of one class


def plot_all(
    model: nn.Module, masks: ClassMasks, test: Dataset, options: argparse.Namespace
) -> list[str]:
    """Draw everything into the run's folder; return the names of the files."""
    image, label = test[0]
    figures = {"class_masks.png": plot_masks(masks), "one_class.png": plot_class(masks, label)}
    heads = plot_heads(model, masks, image.to(options.device), label)
    if heads is not None:
        figures["one_image.png"] = heads
    for name, figure in figures.items():
        with whole_or_not_at_all(options.output / name) as file:
            figure.savefig(file, dpi=120)
        plt.close(figure)
    return list(figures)


def plot_masks(masks: ClassMasks) -> Figure:
    """Draw classes x units of every layer, so that structure shows.

    Classes stand in one order everywhere: along the direction in which all their rows differ
    most. Units stand by the class for which they are most above their own mean.
    """
    tables = [mask.detach().cpu().double() for mask in masks.masks]
    together = torch.cat([table - table.mean(0) for table in tables], dim=1)
    along = torch.linalg.svd(together, full_matrices=False).U[:, 0]
    classes = along.argsort()
    kinds = list(dict.fromkeys(layer.kind for layer in masks.layers))
    by_kind = {kind: [i for i, x in enumerate(masks.layers) if x.kind == kind] for kind in kinds}
    rows = max(map(len, by_kind.values()))
    figure, axes = plt.subplots(rows, len(kinds), figsize=(5 * len(kinds), 1.5 * rows),
                                squeeze=False, layout="constrained")  # fmt: skip
    for column, kind in enumerate(kinds):
        for axis in axes[len(by_kind[kind]) :, column]:
            axis.set_visible(False)
        for axis, i in zip(axes[:, column], by_kind[kind]):
            table = tables[i][classes]
            own = table - table.mean(0)
            order = np.lexsort((-own.max(0).values.numpy(), own.argmax(0).numpy()))
            widest = float(own.abs().max()) or 1.0
            picture = axis.imshow(own[:, order], aspect="auto", cmap="RdBu_r", vmin=-widest,
                                  vmax=widest, interpolation="nearest")  # fmt: skip
            axis.set_title(f"{masks.layers[i].name}, {kind}", fontsize=8)
            axis.set_ylabel("class", fontsize=7)
            if len(classes) <= 10:
                axis.set_yticks(range(len(classes)), [str(int(c)) for c in classes], fontsize=6)
            axis.tick_params(labelsize=6)
            figure.colorbar(picture, ax=axis).ax.tick_params(labelsize=6)
    figure.suptitle("Class masks less each unit's mean over the classes", fontsize=10)
    return figure


def plot_class(masks: ClassMasks, label: int) -> Figure:
    """Draw the units that stand most above their own mean for one class."""
    found = []
    for layer, mask in zip(masks.layers, masks.masks):
        values = mask.detach().cpu()
        lead = values[label] - values.mean(0)
        found += [(float(v), f"{layer.name} {unit}", layer.kind) for unit, v in enumerate(lead)]
    best = sorted(found, reverse=True)[:BEST][::-1]
    figure, axis = plt.subplots(figsize=(6, 0.25 * BEST + 1), layout="constrained")
    colours = {"heads": "tab:orange", "neurons": "tab:blue"}
    axis.barh([name for _, name, _ in best], [value for value, *_ in best],
              color=[colours.get(kind, "grey") for *_, kind in best])  # fmt: skip
    axis.set_xlabel("mask for the class, less the mean over the classes")
    axis.set_title(f"The {BEST} units that carry class {label} (orange: heads)", fontsize=10)
    axis.tick_params(axis="y", labelsize=7)
    return figure


def plot_heads(
    model: nn.Module, masks: ClassMasks, image: Tensor, label: int
) -> Figure | None:
    """Draw where each head looks in one image, beside its value for the image's class.

    A patch is as bright as the attention that it gets, on average over all queries. Heads of
    classes whose forward tells no attention are left out; None if that is all.
    """
    values = {layer: mask[label].detach().cpu()
              for layer, mask in zip(masks.layers, masks.masks)
              if layer.kind == "heads"}  # fmt: skip
    maps = {x: found for x in values if (found := attention_map(model, x, image)) is not None}
    if not maps:
        return None
    columns = max(layer.units for layer in maps) + 1
    figure, axes = plt.subplots(len(maps), columns, figsize=(1.2 * columns, 1.4 * len(maps)),
                                squeeze=False, layout="constrained")  # fmt: skip
    picture = image.detach().cpu().movedim(0, -1)
    picture = (picture - picture.min()) / (picture.max() - picture.min()).clamp(min=1e-6)
    for row, (layer, found) in zip(axes, maps.items()):
        for axis in row:
            axis.axis("off")
        row[0].imshow(picture)
        row[0].set_title(layer.name, fontsize=6)
        for axis, head, value in zip(row[1:], found, values[layer]):
            axis.imshow(head, cmap="viridis")
            axis.set_title(f"{value:.2f}", fontsize=7)
    figure.suptitle(f"Where each head looks, and its mask for class {label}", fontsize=9)
    return figure


@torch.no_grad()
def attention_map(model: nn.Module, layer: UnitLayer, image: Tensor) -> Tensor | None:
    """Return (heads, rows, columns): how much attention each patch gets, None if unknown."""
    drop = getattr(layer.module, "attn_drop", None)
    if not isinstance(drop, nn.Module):
        return None
    seen: list[Tensor] = []
    with _unfused(layer.module):
        handle = drop.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        try:
            model(image[None])
        finally:
            handle.remove()
    if len(seen) != 1 or seen[0].dim() != 4:
        return None
    received = seen[0].float().mean(2).cpu()  # windows, heads, keys
    block = model.get_submodule(layer.name.rpartition(".")[0])
    if hasattr(block, "shift_size"):
        return _from_windows(received, block)
    side = math.isqrt(received.shape[2])  # tokens before the patches are no squares
    return received[0, :, received.shape[2] - side**2 :].unflatten(1, (side, side))


def _from_windows(received: Tensor, block: nn.Module) -> Tensor:
    """Put the windows of a Swin block back where they lie in the image."""
    (high, wide), (height, width) = block.window_size, block.input_resolution
    rows, columns = -(-height // high), -(-width // wide)
    whole = received.unflatten(2, (high, wide)).unflatten(0, (rows, columns))
    whole = whole.permute(2, 0, 3, 1, 4).reshape(-1, rows * high, columns * wide)
    whole = whole[:, :height, :width]
    return whole.roll(tuple(block.shift_size), dims=(1, 2))


@contextlib.contextmanager
def _unfused(attention: nn.Module) -> Iterator[None]:
    """Let a timm attention compute its weights in the open."""
    before = getattr(attention, "fused_attn", None)
    if before is None:
        yield
        return
    attention.fused_attn = False
    try:
        yield
    finally:
        attention.fused_attn = before

"""Scores for whole heads and neurons, some from weights alone and some from labelled images."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from images import autocast
from torch import Tensor, nn

from torch_dimap import dimap_scores
from torch_dimap.units import UnitLayer, unit_magnitudes

Scores = dict[UnitLayer, Tensor]


def norm(layer: UnitLayer) -> Tensor:
    """Return the norm of all that a unit holds."""
    norms = []
    for part in (part for part in layer.parts if part.masked):
        view, others = part.by_unit(part.tensor)
        norms.append(torch.linalg.vector_norm(view, dim=others))
    return torch.stack(norms).norm(dim=0)


def value_path(layer: UnitLayer) -> Tensor:
    """Return the norm of the matrix that a unit applies to its input, softmax or GELU aside.

    For a neuron that is the product; for a head, projection times value.
    """
    if layer.kind != "heads":
        return unit_magnitudes(layer)
    part = layer.parts[0]  # of qkv: its last block holds the values
    view, _ = part.by_unit(part.tensor)
    values = view[-1]  # units, entries, inputs
    columns, _ = layer.read.by_unit(layer.read.tensor)  # outputs, 1, units, entries
    return torch.einsum("ohe,hei->hoi", columns[:, 0], values).flatten(1).norm(dim=1)


def weights_alone(score: Callable[[UnitLayer], Tensor]) -> Callable[..., Scores]:
    return lambda layers, model, batch, options: {layer: score(layer) for layer in layers}


def taylor(
    layers: list[UnitLayer],
    model: nn.Module,
    batch: tuple[Tensor, Tensor],
    options: argparse.Namespace,
) -> Scores:
    """Return the mean over images of how much the loss would change without a unit."""
    inputs: dict[UnitLayer, Tensor] = {}

    def keep(layer: UnitLayer) -> Callable:
        def hook(_: nn.Module, arguments: tuple[Tensor]) -> None:
            arguments[0].retain_grad()
            inputs[layer] = arguments[0]

        return hook

    hooks = [layer.reader.register_forward_pre_hook(keep(layer)) for layer in layers]
    images, labels = (x.to(options.device) for x in batch)
    with autocast(options):
        outputs = model.eval()(images)
    F.cross_entropy(outputs.float(), labels).backward()
    for hook in hooks:
        hook.remove()
    scores = {}
    for layer, x in inputs.items():
        change = (x * x.grad).movedim(layer.channels, -1).reshape(len(images), -1, x.shape[-1])
        heads = change.sum(1).unflatten(1, (layer.units, -1))
        scores[layer] = heads.sum(2).abs().mean(0).float()
    model.zero_grad()
    return scores


def torch_pruning(
    layers: list[UnitLayer],
    model: nn.Module,
    batch: tuple[Tensor, Tensor],
    options: argparse.Namespace,
) -> Scores:
    """Return Torch-Pruning's magnitudes of the channels that a unit is made of, their mean."""
    try:
        import torch_pruning as tp
    except ImportError:
        raise SystemExit("The score torch-pruning needs: pip install torch-pruning") from None
    attentions = {x.module: x.module.fused_attn for x in layers if hasattr(x.module, "fused_attn")}
    for attention in attentions:
        attention.fused_attn = False  # the plain products alone are traced
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of parameters that no layer of it knows
        graph = tp.DependencyGraph().build_dependency(model, batch[0][:1].to(options.device))
    for attention, fused in attentions.items():
        attention.fused_attn = fused
    importance, scores = tp.importance.GroupMagnitudeImportance(), {}
    for layer in layers:
        channels = list(range(layer.reader.in_features))
        group = graph.get_pruning_group(layer.reader, tp.prune_linear_in_channels, channels)
        scores[layer] = importance(group).detach().unflatten(0, (layer.units, -1)).mean(1)
    return scores


def chance(layers: list[UnitLayer], *_: object) -> Scores:
    return {layer: torch.rand(layer.units) for layer in layers}


SCORES: dict[str, Callable[..., Scores]] = {
    "norm": weights_alone(norm),
    "product": weights_alone(unit_magnitudes),  # of what makes a unit and what reads it
    "value path": weights_alone(value_path),
    "taylor": taylor,
    "torch-pruning": torch_pruning,
    "random": chance,
    "dimap": weights_alone(lambda layer: dimap_scores(unit_magnitudes(layer))),
}

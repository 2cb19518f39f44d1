"""Multiply-adds of dense and masked models; the only file that knows fvcore.

fvcore traces one forward and applies a formula to every operator it meets. The
formulas for products are those of :mod:`torch_dimap.accounting.products`, which credit the
weights rather than the modules that multiply; those for norms and pooling are fvcore's.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from tqdm import tqdm

from torch_dimap.accounting.inputs import Inputs, arguments_for, called_by_place
from torch_dimap.accounting.products import Handle, product_handles, refuse_unknown
from torch_dimap.masking import (
    Layer,
    Pair,
    count_nonzero,
    find_layers_in,
    pruned_tensors,
    stand_in_for_shards,
    untouched,
)


class Flops(NamedTuple):
    """Multiply-adds of a layer, a group or a model, under three conventions."""

    dense: int
    masked: int
    uniform: int


@dataclass(frozen=True)
class FlopCount:
    """What :func:`count_flops` found, in multiply-adds.

    Attributes:
        dense: all products, whether or not their weights are zero.
        masked: every prunable layer weighted by its own density.
        uniform: every prunable layer weighted by the density of its group, which is
            the paper's convention: amount x FLOPs of the prunable layers are saved.
        groups: group -> :class:`Flops` of its layers together.
        layers: the layer's name in the state dict -> :class:`Flops`.
    """

    dense: int
    masked: int
    uniform: int
    groups: dict[str, Flops]
    layers: dict[str, Flops]


def count_flops(
    model: nn.Module,
    inputs: Inputs,
    parameters: Mapping[str, Iterable[Pair]] | Iterable[Pair] | None = None,
    op_handles: Mapping[str, Handle | None] | None = None,
    progress: bool = False,
) -> FlopCount:
    """Count the multiply-adds of one forward, and those that pruning saves.

    One fused multiply-add is one FLOP, as in fvcore and in the paper
    (``torch.utils.flop_counter`` counts two). Products, convolutions, norms and
    pooling count; biases, activations, softmax and other elementwise work do not, nor
    do the multiplications of weights by masks. The forward runs in evaluation mode.

    The savings are theoretical: dense kernels do not run faster on zeros. Masked and
    baked models (see :func:`torch_dimap.remove_all`) give the same numbers: what
    counts is how many weights are not zero.

    Args:
        model: the model; it comes back as it was, also if the count fails.
        inputs: a tensor, or a tuple of them, to call the model with, on its device; a dict
            of arguments by name; or the shape of the tensor, such as ``(1, 3, 224, 224)``.
            The counts are for all of it; use a batch of one for FLOPs per image.
        parameters: group -> ``(module, name)`` pairs, or pairs alone, to hold apart
            and to weight by their density. Default: ``group_parameters(model)``.
        op_handles: operator -> formula in fvcore's form, or None to count it as
            nothing; for operators that this function does not know.
        progress: show a bar of the modules that are traced: a large network takes as long
            as ten forwards.

    Returns:
        Dense, masked and uniform counts, as ints, in all, by group and by layer.

    Raises:
        TypeError, ValueError: for a ``parameters`` that does not fit the model.
        NotImplementedError: if an operator multiplies matrices and has no formula.

    Source: He and Zhou, ICLR 2024, Table 1, for the uniform convention.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> _ = nn.utils.prune.l1_unstructured(net[0], "weight", amount=0.5)
        >>> groups = {"first": [(net[0], "weight")]}
        >>> count = count_flops(net, torch.zeros(1, 8), groups)
        >>> count.dense, count.masked, count.groups["first"].masked
        (40, 24, 16)
    """
    groups = find_layers_in(model, parameters, "count_flops()")
    inputs = arguments_for(model, inputs, "count_flops()")
    layers = [layer for members in groups.values() for layer in members]
    return weigh(*_trace(model, inputs, layers, op_handles or {}, progress), groups)


def weigh(
    total: int, dense: Mapping[str, int], groups: Mapping[str, Sequence[Layer]]
) -> FlopCount:
    """Weight the multiply-adds of a dense forward by the density that layers have now.

    Args:
        total: of all the model.
        dense: of each layer, by its label.
        groups: group -> layers, masked or baked.
    """
    layers = [layer for members in groups.values() for layer in members]
    counts = count_nonzero([layer.weight for layer in layers], "count_flops()")
    kept = {layer.label: count for layer, count in zip(layers, counts)}
    size = {layer.label: layer.parameter.numel() for layer in layers}
    by_group, by_layer = {}, {}
    for group, members in groups.items():
        labels = [layer.label for layer in members]
        left, weights = sum(kept[x] for x in labels), sum(size[x] for x in labels)
        for x in labels:
            masked = weighted_flops(dense[x], kept[x], size[x])
            by_layer[x] = Flops(dense[x], masked, weighted_flops(dense[x], left, weights))
        of_group = sum(dense[x] for x in labels)
        masked = sum(by_layer[x].masked for x in labels)
        by_group[group] = Flops(of_group, masked, weighted_flops(of_group, left, weights))
    saved = [sum(f.dense - f[i] for f in by_group.values()) for i in (1, 2)]
    return FlopCount(total, total - saved[0], total - saved[1], by_group, by_layer)


def weighted_flops(flops: int, kept: int, weights: int) -> int:
    """Return ``flops * kept / weights`` to the nearest int, exactly also beyond 2**53."""
    return (2 * flops * kept + weights) // (2 * weights) if weights else 0


def flops_by_module(model: nn.Module, inputs: Any) -> Counter[str]:
    """Count the multiply-adds of a dense forward by module, "" being the model itself."""
    return _analyse(model, inputs, [], {}).by_module()


def _trace(
    model: nn.Module,
    inputs: Any,
    layers: list[Layer],
    op_handles: Mapping[str, Handle | None],
    progress: bool,
) -> tuple[int, Counter[str]]:
    """Return the FLOPs of a dense forward, in all and by the label of the weight."""
    analysis = _analyse(model, inputs, layers, op_handles, progress)
    dense = Counter({layer.label: 0 for layer in layers})
    for key, count in analysis.by_operator().items():
        if isinstance(key, Layer):
            dense[key.label] += int(count)
    return int(analysis.total()), dense


def _analyse(
    model: nn.Module,
    inputs: Any,
    layers: list[Layer],
    op_handles: Mapping[str, Handle | None],
    progress: bool = False,
) -> Any:
    """Trace a dense forward with fvcore, and refuse what it cannot count."""
    with warnings.catch_warnings():  # the import scripts functions, which torch deprecates
        warnings.simplefilter("ignore", FutureWarning)
        from fvcore.nn import FlopCountAnalysis

    model = getattr(model, "_orig_mod", model)  # what torch.compile wraps: it cannot be traced
    modules = [m for m in model.modules() if not isinstance(m, torch.jit.ScriptModule)]
    bar = tqdm(total=len(modules), unit=" modules", desc="FLOPs", leave=False, disable=not progress)

    def tick(*_: Any) -> None:  # as a hook it must return nothing, and update() may not
        bar.update()

    with untouched(model), called_by_place(model, inputs) as placed, bar:
        for module in modules if progress else ():
            module.register_forward_hook(tick)
        for layer in pruned_tensors(model, "count_flops()"):
            # For parents that read the tensor before any hook has made it anew.
            vars(layer.module)[layer.name] = layer.parameter
        stand_in_for_shards(model, "count_flops()")
        analysis = FlopCountAnalysis(model, placed)
        analysis.set_op_handle(**{**product_handles(model, layers), **op_handles})
        analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
        analysis.total()  # traces now, and keeps the counts
    refuse_unknown(analysis.unsupported_ops())
    return analysis

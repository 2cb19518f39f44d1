"""What pruning has left of a model: layers, groups and totals."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from torch_dimap.accounting.flops import Flops, count_flops
from torch_dimap.accounting.inputs import Inputs, shapes_in
from torch_dimap.accounting.slim import UnitsLeft, count_slim_flops, units_of_tensors
from torch_dimap.accounting.table import Row, Summary, by
from torch_dimap.accounting.thresholds import check_thresholds
from torch_dimap.masking import Layer, Pair, find_layers_in
from torch_dimap.operations import replaced_attentions
from torch_dimap.sharding import whole_of

NOTE = (
    "FLOPs: multiply-adds for inputs of {inputs}. masked: every layer weighted by its own\n"
    "density. uniform, the paper's convention: every layer weighted by its group's density.\n"
    "Savings are theoretical: dense kernels do not run faster on zeros."
)
SLIM_NOTE = (
    "\nslim is not: counted with the dead units cut out, as remove_units does it, zeros included."
)


def summarize(
    model: nn.Module,
    inputs: Inputs | None = None,
    parameters: Mapping[str, Iterable[Pair]] | Iterable[Pair] | None = None,
    thresholds: Mapping[str, float] | None = None,
    progress: bool = False,
) -> Summary:
    """Tell by layer, by group and in all what pruning has left of a model.

    Shares are given of two wholes: the prunable weights, and all parameters of the
    model (biases, norms, embeddings and heads included). Masked and baked models give
    the same numbers: a weight counts as gone if it is zero. Where heads or neurons are
    dead or have been removed, see :func:`torch_dimap.remove_units`, it is told how many of
    their layer are left, and, unless it is sharded, what the model costs without them.

    Args:
        model: the model; it is only read.
        inputs: what to call the model with; then FLOPs are counted too, see
            :func:`torch_dimap.count_flops`.
        parameters: group -> ``(module, name)`` pairs, or pairs alone. Default:
            ``group_parameters(model)``.
        thresholds: group -> threshold, as the pruning call returned them.
        progress: show a bar while FLOPs are counted.

    Returns:
        A :class:`Summary`: ``str()`` or ``.to_markdown()`` for people, ``.to_dict()``
        and ``.to_csv()`` for programs.

    Raises:
        TypeError, ValueError: for ``parameters`` that do not fit the model, or
            thresholds of unknown groups.
        NotImplementedError: if FLOPs cannot be counted.

    Example:
        >>> net = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> _ = nn.utils.prune.l1_unstructured(net[0], "weight", amount=0.25)
        >>> table = summarize(net, parameters={"first": [(net[0], "weight")]})
        >>> table.groups[0].density, table.model.zeros, table.model.weights
        (0.75, 8, 46)
    """
    groups = find_layers_in(model, parameters, "summarize()")
    check_thresholds(thresholds, groups, "summarize()")
    pairs = {g: [(x.module, x.name) for x in layers] for g, layers in groups.items()}
    units = units_of_tensors(model)
    flops = None if inputs is None else count_flops(
        model, inputs, pairs, progress=progress
    )
    slim = None if inputs is None or not units else count_slim_flops(model, inputs, pairs)
    rows = {
        group: [
            _layer_row(
                layer,
                group=group,
                flops=flops and flops.layers[layer.label],
                slim_flops=slim and slim.layers[layer.label].dense,
                **_units([units.get((layer.module, layer.name))]),
            )
            for layer in members
        ]
        for group, members in groups.items()
    }
    layers = [row for members in rows.values() for row in members]
    prunable = _total(
        "prunable",
        layers,
        level="total",
        flops=flops and Flops(*map(sum, zip(*flops.groups.values()))),
        slim_flops=slim and sum(of_group.dense for of_group in slim.groups.values()),
    )
    note = "" if inputs is None else NOTE.format(inputs=" and ".join(map(by, shapes_in(inputs))))
    return Summary(
        layers=layers,
        groups=[
            _total(
                group,
                members,
                level="group",
                threshold=(thresholds or {}).get(group),
                flops=flops and flops.groups[group],
                slim_flops=slim and slim.groups[group].dense,
                **_units([units.get(pair) for pair in pairs[group]]),
            )
            for group, members in rows.items()
        ],
        prunable=prunable,
        model=prunable._replace(
            name="model",
            weights=sum(parameter.numel() for parameter in model.parameters()),
            flops=Flops(flops.dense, flops.masked, flops.uniform) if flops else None,
            slim_flops=slim.dense if slim else None,
        ),
        note=note + (SLIM_NOTE if slim else "") + _replaced(model),
    )


def _replaced(model: nn.Module) -> str:
    """Say what stands in the place of attentions, which no row tells."""
    counts = Counter(made.operation for made in replaced_attentions(model).values())
    found = ", ".join(f"{count} {operation}" for operation, count in sorted(counts.items()))
    return f"\nIn the place of attentions: {found}." if found else ""


def _units(left: list[UnitsLeft | None]) -> dict[str, int]:
    """Add up the units of layers, each counted once and all of one kind, or say nothing."""
    if None in left or len({of.kind for of in left if of}) != 1:
        return {}
    layers = {(of.name, of.kind): of for of in left if of}.values()
    return {"units": sum(x.dense for x in layers), "units_kept": sum(x.kept for x in layers)}


def _layer_row(layer: Layer, **fields: Any) -> Row:
    alive = whole_of(layer.weight) != 0
    shape = tuple(alive.shape)
    if alive.dim() < 2:
        alive = alive.reshape(-1, 1)
    return Row(
        level="layer",
        name=layer.label,
        weights=alive.numel(),
        zeros=int((~alive).sum()),
        dead_rows=int((~alive.flatten(1).any(1)).sum()),
        dead_columns=int((~alive.transpose(0, 1).flatten(1).any(1)).sum()),
        shape=shape,
        **fields,
    )


def _total(name: str, rows: list[Row], **fields: Any) -> Row:
    return Row(
        name=name,
        weights=sum(row.weights for row in rows),
        zeros=sum(row.zeros for row in rows),
        dead_rows=sum(row.dead_rows for row in rows),
        dead_columns=sum(row.dead_columns for row in rows),
        **fields,
    )

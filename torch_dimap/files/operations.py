"""What was done to a model's layers: told in a file's record, and done to another model.

The record names operations by layer, ``{"blocks.0.attn": {"heads": 3}}``: of this layer
three heads stay. Which ones they were does not matter to who fills in the tensors.
``{"blocks.0.attn": {"conv3": 64}}``: in its place is a convolution of so many channels.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from torch_dimap.operations import (
    TAPS,
    Operation,
    SharedConvolution,
    Site,
    find_sites,
    plain_operation,
    replaced_attentions,
)
from torch_dimap.storage import Operations
from torch_dimap.units import UnitLayer, UnitRule, count_units, describe_units

# What may stand in an attention's place.
REPLACEMENTS = (*TAPS, "skip")


def operations_of(model: nn.Module, rule: UnitRule | None, caller: str) -> Operations:
    """Return what to do to the dense model to get one of this model's shape.

    Raises:
        ValueError: if a layer that units were removed from is not as it was then, or a
            convolution in an attention's place still mixes heads.
    """
    found: Operations = {}
    for name, made in replaced_attentions(model).items():
        if isinstance(made, SharedConvolution):
            raise ValueError(
                f"{caller}: convolutions must be plain to be saved, found that {name} mixes the "
                "heads of its attention: call torch_dimap.learning.collapse_convolutions(model), "
                "or to go on training save model.state_dict()."
            )
        found[name] = {made.operation: made.number}
    for count in count_units(model, rule):
        if count.noted is None:
            continue
        if count.units != count.noted or (count.layer is None and count.units):
            state = "is not described" if count.layer is None else f"has {count.units} now"
            raise ValueError(
                f"{caller}: {count.name} must have the {count.noted} {count.kind} that "
                f"remove_units left, found that it {state}: pass unit_rule= as rule= was passed "
                "to remove_units, and change such layers by remove_units only."
            )
        found.setdefault(count.name, {})[count.kind] = count.units
    return found


def plan_replacements(
    model: nn.Module, operations: Operations, where: str
) -> dict[Site, Operation]:
    """Make what is to stand in the place of a model's attentions, as a file tells.

    Raises:
        ValueError: if the model has no such attentions.
    """
    wanted = {name: done for name, done in operations.items() if done.keys() & set(REPLACEMENTS)}
    if not wanted:
        return {}
    sites = {site.name: site for site in find_sites(model, where)}
    made = {}
    for name, done in wanted.items():
        (operation, number), *others = done.items()
        site = sites.get(name)
        if others:
            raise ValueError(
                f"{where} must tell of one operation in the place of {name[:80]!r}, found "
                f"{len(done)}."
            )
        if site is None or isinstance(site.attention, Operation):
            raise ValueError(
                f"{where} tells of {operation[:40]!r} in the place of {name[:80]!r}, where "
                f"{type(model).__name__} has no attention: build the model that the file was "
                "written from."
            )
        if number not in ((0, 1) if operation == "skip" else (site.width,)):
            raise ValueError(
                f"{where} tells of {operation} of {number} in the place of {name}, which must be "
                f"{'0 or 1' if operation == 'skip' else site.width}: build the model that the "
                "file was written from."
            )
        made[site] = plain_operation(site, operation, number)
    return made


def plan_cuts(
    model: nn.Module, operations: Operations, rule: UnitRule | None, where: str
) -> dict[UnitLayer, Tensor]:
    """Say which units of a model go so that as many are left as a file tells.

    Raises:
        ValueError: if the model cannot have so many.
    """
    replaced = set(REPLACEMENTS)
    operations = {name: done for name, done in operations.items() if not done.keys() & replaced}
    if not operations:
        return {}
    layers = {(layer.name, layer.kind): layer for layer in describe_units(model, rule, where)}
    empty = {(count.name, count.kind) for count in count_units(model, rule) if not count.units}
    keeps = {}
    for name, numbers in operations.items():
        for kind, units in numbers.items():
            layer = layers.get((name, kind))
            if layer is None and not units and (name, kind) in empty:
                continue
            if layer is None or layer.obstacle:
                raise ValueError(
                    f"{where} tells of {kind[:40]!r} removed from {name[:80]!r}, which "
                    f"{type(model).__name__} has none to remove of: build the model that the "
                    "file was written from, and pass unit_rule= if it was slimmed with a rule."
                )
            least = 1 if layer.empty is None else 0
            if not least <= units <= layer.units:
                raise ValueError(
                    f"{where} tells that {units} {kind} of {name} stay, which must be between "
                    f"{least} and {layer.units}: build the model that the file was written from."
                )
            if units < layer.units:
                keeps[layer] = torch.arange(layer.units) < units
    return keeps


def shapes_after(
    model: nn.Module, state: Mapping[str, Tensor], keeps: Mapping[UnitLayer, Tensor]
) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a model's state once it is cut, without cutting it."""
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    places: dict[nn.Module, list[str]] = {}
    for place, module in model.named_modules(remove_duplicate=False):
        places.setdefault(module, []).append(place)
    for layer, keep in keeps.items():
        for part in layer.parts:
            for name in (f"{place}.{part.name}".lstrip(".") for place in places[part.module]):
                if name in shapes:  # a buffer may be none of the state
                    shape = list(shapes[name])
                    shape[part.dim] = part.blocks * int(keep.count_nonzero()) * part.entries
                    shapes[name] = tuple(shape)
    return shapes


def modules_of(layers: Iterable[UnitLayer]) -> list[nn.Module]:
    """Return all modules that cutting units of these layers changes."""
    found: dict[nn.Module, None] = {}
    for layer in layers:
        found[layer.module] = None
        found.update(dict.fromkeys(part.module for part in layer.parts))
        found.update(dict.fromkeys(attribute.module for attribute in layer.attributes))
    return list(found)


def describe_operations(operations: Operations) -> list[str]:
    """Tell of a file's operations in a line for each kind."""
    kinds: dict[str, list[int]] = {}
    for numbers in operations.values():
        for kind, number in numbers.items():
            kinds.setdefault(kind, []).append(number)
    return [
        f"{kind} in the place of {len(numbers):,} attentions"
        if kind in REPLACEMENTS
        else f"slim: {sum(numbers):,} {kind} are left in {len(numbers):,} layers, "
        f"{min(numbers):,} to {max(numbers):,} in each"
        for kind, numbers in kinds.items()
    ]

"""What a call on units was given, checked in full before anything is ranked or masked."""

from __future__ import annotations

import numbers
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from torch_dimap.masking import SINGLE_GROUP
from torch_dimap.selection import check_finite
from torch_dimap.units.description import UnitLayer


def unit_layers_in(units: Any) -> Iterator[UnitLayer]:
    """Yield the unit layers in what may hold other things too."""
    for layers in units.values() if isinstance(units, Mapping) else [units]:
        if isinstance(layers, (list, tuple, set, frozenset)):
            yield from (layer for layer in layers if isinstance(layer, UnitLayer))


def check_units(
    units: Mapping[str, Iterable[UnitLayer]] | Iterable[UnitLayer], caller: str
) -> dict[str, list[UnitLayer]]:
    """Check that what is to be masked is what was described, each layer once."""
    if isinstance(units, (nn.Module, UnitLayer)) or not isinstance(units, Iterable):
        raise TypeError(
            f"{caller}: units must be a mapping group -> unit layers, or an iterable of unit "
            f"layers, found {type(units).__name__}: see group_units(model)."
        )
    by_group = units if isinstance(units, Mapping) else {SINGLE_GROUP: units}
    groups = {group: list(layers) for group, layers in by_group.items()}
    seen: set[tuple[str, str]] = set()
    for group, layers in groups.items():
        for layer in layers:
            if not isinstance(layer, UnitLayer):
                raise TypeError(
                    f"{caller}: units[{group!r}] must hold unit layers, found "
                    f"{type(layer).__name__}: see group_units(model)."
                )
            if (layer.name, layer.kind) in seen:
                raise ValueError(f"{caller}: {layer.name} is listed twice: list it once.")
            if not layer.is_current():
                raise ValueError(
                    f"{caller}: {layer.name} had {layer.units} {layer.kind} when it was "
                    "described, and has another number now: call group_units(model) again."
                )
            seen.add((layer.name, layer.kind))
        if not layers:
            raise ValueError(f"{caller}: units[{group!r}] is empty: list some, or leave it out.")
    if not groups:
        raise ValueError(f"{caller}: units is empty, found no group and no unit layer.")
    return groups


def check_numbers(minimum: Any, multiple: Any, caller: str) -> None:
    """Raise unless both are integers that make sense."""
    for name, value, least in (("minimum", minimum, 0), ("multiple", multiple, 1)):
        if isinstance(value, bool) or not isinstance(value, numbers.Integral):
            raise TypeError(f"{caller}: {name} must be an int, found {type(value).__name__}.")
        if value < least:
            raise ValueError(f"{caller}: {name} must be {least} or more, found {value}.")


def check_scores(
    groups: dict[str, list[UnitLayer]],
    importance_scores: Mapping[Any, Tensor] | None,
    caller: str,
) -> dict[UnitLayer, Tensor] | None:
    """Return the given scores by unit layer, once there is a fitting one for each."""
    if importance_scores is None:
        return None
    if not isinstance(importance_scores, Mapping):
        raise TypeError(
            f"{caller}: importance_scores must be a mapping unit layer -> tensor, found "
            f"{type(importance_scores).__name__}."
        )
    given: dict[UnitLayer, Tensor] = {}
    used = set()
    for layer in (layer for layers in groups.values() for layer in layers):
        key = next((key for key in (layer, layer.name) if key in importance_scores), None)
        if key is None:
            raise ValueError(
                f"{caller}: importance_scores has none for {layer.name}: give scores for every "
                "layer in units, or none at all."
            )
        used.add(key)
        given[layer] = importance_scores[key]
        check_finite(given[layer], f"{caller}: importance_scores of {layer.name}")
        if given[layer].shape != (layer.units,):
            raise ValueError(
                f"{caller}: importance_scores of {layer.name} must have the shape "
                f"({layer.units},), found {tuple(given[layer].shape)}."
            )
    if len(used) < len(importance_scores):
        raise ValueError(
            f"{caller}: importance_scores must be for layers listed in units, found "
            f"{len(importance_scores) - len(used)} more: leave them out, or list their layers."
        )
    return given

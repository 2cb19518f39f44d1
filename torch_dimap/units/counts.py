"""How many units a layer had, has, and still needs."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from torch_dimap.masking import survey
from torch_dimap.units.description import UnitLayer
from torch_dimap.units.grouping import UnitRule, builtin_unit_rule

# On a module that units were cut out of: kind -> how many it had at first, and how many it
# has now. A plain attribute, so copies and pickles of the module have it too.
NOTE = "unit_counts"


class UnitCount(NamedTuple):
    """The units of one layer.

    Attributes:
        name: the module's qualified name in the model.
        kind: ``"heads"`` or ``"neurons"``.
        dense: how many the layer had before any was removed.
        units: how many it has now.
        noted: how many it had when units were last removed from it; None if none were.
        layer: its description; None where the rule gives none, as for layers without units.
    """

    name: str
    kind: str
    dense: int
    units: int
    noted: int | None
    layer: UnitLayer | None

    @property
    def alive(self) -> int:
        """How many units masks and zeros leave something of."""
        return self.units if self.layer is None else int(self.layer.alive().count_nonzero())


def count_units(model: nn.Module, rule: UnitRule | None = None) -> list[UnitCount]:
    """Count the units of a model's layers, also of those that have none any more.

    Args:
        model: the model; it is only read.
        rule: as for :func:`torch_dimap.group_units`.

    Returns:
        One count per unit layer, in the order of definition.
    """
    counts = []
    for module, (name, _) in survey(model).items():
        noted = getattr(module, NOTE, {})
        layers = {layer.kind: layer for layer in (rule or builtin_unit_rule)(name, module)}
        for kind in {**layers, **noted}:
            dense, left = noted.get(kind, (None, None))
            layer = layers.get(kind)
            units = left if layer is None else layer.units
            counts.append(UnitCount(name, kind, dense or units, units, left, layer))
    return counts


def note_cut(layer: UnitLayer, units: int) -> None:
    """Note on its module that a layer is left with so many units."""
    noted = getattr(layer.module, NOTE, {})
    dense, _ = noted.get(layer.kind, (layer.units, None))
    setattr(layer.module, NOTE, {**noted, layer.kind: (dense, units)})

"""The shape of a row: where a class of attention or MLP keeps its units."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn


class Row(NamedTuple):
    """Where a module keeps its units: paths below the module, to layers or to tensors."""

    makes: dict[str, int]  # whose rows make the units -> how many blocks of them
    reader: str  # whose columns take the units in
    number: str = ""  # path to the attribute that counts the units; "": the reader's columns
    widths: tuple[str, ...] = ()  # attributes that are the number of all their entries
    counts: tuple[str, ...] = ()  # further attributes that are the number of units
    places: dict[str, int] = {}  # attributes that are tuples -> where in them the number is
    along: dict[str, int] = {}  # what else goes with its unit -> the dimension
    mixed: tuple[str, ...] = ()  # what mixes units, unless it is absent or a batch norm
    columns: int = 1  # how many blocks the reader's columns come in
    forward: type[nn.Module] | None = None  # where the class's own does not follow the number
    empty: type[nn.Module] | None = None  # where no unit is left

    def numbers(self, per_unit: int) -> list[tuple[str, int, int | None]]:
        """List path, number per unit and place of all attributes that follow the units."""
        counts = [(path, 1, None) for path in (self.number, *self.counts) if path]
        widths = [(path, per_unit, None) for path in self.widths]
        return [*counts, *widths, *((path, 1, place) for path, place in self.places.items())]

"""What a unit layer is: one layer's heads or neurons, and every tensor that holds them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from torch_dimap.sharding import whole_of

HEADS, NEURONS = "heads", "neurons"


class Part(NamedTuple):
    """Where a tensor holds the units: along ``dim``, ``blocks`` times one after the other.

    The dimension is ``blocks * units * entries`` long: a query/key/value weight, say, has
    three blocks along its rows, and in each of them ``entries`` rows for every head.
    """

    module: nn.Module
    name: str  # of a parameter, or of a buffer; of a pruned one: without _orig
    dim: int
    blocks: int
    entries: int
    masked: bool = True  # False: is cut with its unit, and needs no mask before

    @property
    def tensor(self) -> Tensor:
        """The tensor itself; where it is pruned, the values behind the mask."""
        for table in (self.module._parameters, self.module._buffers):
            for key in (self.name, f"{self.name}_orig"):
                tensor = table.get(key)
                if tensor is not None:
                    return tensor
        raise AttributeError(f"{type(self.module).__name__} has no tensor {self.name!r}.")

    @property
    def mask(self) -> Tensor | None:
        """The pruning mask of the tensor, None while it is unpruned; sharded or not like it."""
        return self.module._buffers.get(f"{self.name}_mask")

    @property
    def values(self) -> Tensor:
        """The tensor's values, zero where they are masked; gathered where they are sharded."""
        values, mask = whole_of(self.tensor.detach()), self.mask
        return values if mask is None else values * whole_of(mask)

    def by_unit(self, tensor: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        """View a tensor of this part's shape unit by unit; say what to reduce for one each."""
        units = tensor.shape[self.dim] // (self.blocks * self.entries)
        view = tensor.detach().unflatten(self.dim, (self.blocks, units, self.entries))
        return view, tuple(i for i in range(view.dim()) if i != self.dim + 1)

    def along(self, values: Tensor) -> Tensor:
        """Spread values, one per unit in their last dimension, over the part's entries."""
        spread = values.repeat_interleave(self.entries, dim=-1)
        return spread if self.blocks == 1 else torch.cat([spread] * self.blocks, dim=-1)


class Attribute(NamedTuple):
    """A number that a module keeps of its units, such as ``num_heads``."""

    module: nn.Module
    name: str
    per_unit: int  # the number is this times the number of units
    place: int | None = None  # where in the attribute the number is, if it is a tuple

    @property
    def number(self) -> int | None:
        """What the attribute is now, None if there is none."""
        value = getattr(self.module, self.name, None)
        return value if self.place is None or value is None else value[self.place]

    def follow(self, units: int) -> None:
        """Set the attribute to what it is for another number of units."""
        number = self.per_unit * units
        if self.place is None:
            setattr(self.module, self.name, number)
        else:
            numbers = list(getattr(self.module, self.name))
            numbers[self.place] = number
            setattr(self.module, self.name, tuple(numbers))


class UnitLayer(NamedTuple):
    """The units of one layer: the heads of an attention, the neurons of an MLP.

    A gate on the units is a forward pre-hook on ``reader``, which multiplies its input, along
    dimension ``channels``, by ``read.along(gates)``.
    """

    name: str  # the module's qualified name in the model
    kind: str  # "heads" or "neurons"
    units: int
    module: nn.Module  # the attention or the MLP
    parts: tuple[Part, ...]
    attributes: tuple[Attribute, ...]  # to set when units are removed
    reader: nn.Module  # the layer that takes the units in: attn.proj, mlp.fc2
    channels: int = -1  # the dimension of the reader's input along which the units lie
    forward: type[nn.Module] | None = None  # in place of one that does not follow `attributes`
    empty: type[nn.Module] | None = None  # the same where no unit is left; None: one must stay
    obstacle: str = ""  # what stands against removing units exactly
    multiply_adds: int | None = None  # of one unit, for given inputs; None: not counted

    @property
    def read(self) -> Part:
        """The part through which the reader takes the units in: its weight's columns."""
        return next(p for p in self.parts if p.module is self.reader and p.name == "weight")

    def is_current(self) -> bool:
        """Tell whether the parts still hold as many units as when they were described."""
        return all(
            part.tensor.shape[part.dim] == part.blocks * self.units * part.entries
            for part in self.parts
        )

    def unmasked(self) -> Tensor:
        """Return one flag per unit: False where masks leave the reader nothing of it."""
        mask = self.read.mask
        if mask is None:
            return torch.ones(self.units, dtype=torch.bool, device=self.read.tensor.device)
        view, others = self.read.by_unit(whole_of(mask) != 0)
        return view.any(others)

    def alive(self) -> Tensor:
        """Return one flag per unit: False where masks or zeros leave the reader nothing."""
        view, others = self.read.by_unit(self.read.values != 0)
        return view.any(others)

    def staying(self, keep: Tensor) -> Tensor:
        """Return what removal leaves of these flags: the first unit if one must stay."""
        return keep if keep.any() or self.empty is not None else torch.arange(self.units) == 0

"""What a model has left of its units, and what it costs once the dead ones are removed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from torch import nn

from torch_dimap.accounting.flops import FlopCount, count_flops
from torch_dimap.accounting.inputs import Inputs
from torch_dimap.masking import Pair, snapshot
from torch_dimap.sharding import is_sharded
from torch_dimap.units import UnitCount, count_units, cut_units, list_units


class UnitsLeft(NamedTuple):
    """How many units of a layer are left."""

    name: str  # of the unit layer
    kind: str
    dense: int  # that the layer had at first
    kept: int  # that are neither removed nor dead


def units_of_tensors(model: nn.Module) -> dict[Pair, UnitsLeft]:
    """Return what is left of the units that tensors hold; empty if none has gone anywhere."""
    found: dict[Pair, UnitsLeft] = {}
    for count in count_units(model):
        left = UnitsLeft(count.name, count.kind, count.dense, count.alive)
        found.update(dict.fromkeys(_tensors(model, count), left))
    return found if any(left.kept < left.dense for left in found.values()) else {}


def _tensors(model: nn.Module, count: UnitCount) -> Iterable[Pair]:
    """Return the tensors that hold a layer's units; of one without units, all in its module."""
    if count.layer is not None:
        return [(part.module, part.name) for part in count.layer.parts]
    modules = model.get_submodule(count.name).modules()
    return [(m, name.removesuffix("_orig")) for m in modules for name in m._parameters]


def count_slim_flops(
    model: nn.Module,
    inputs: Inputs,
    parameters: Mapping[str, Iterable[Pair]],
) -> FlopCount | None:
    """Count the multiply-adds that a model will have once its dead units are removed.

    They are those of the smaller tensors, not of the dense ones weighted by anything. The
    units are cut out for the count, and then the model is put back as it was. From sharded
    tensors nothing can be cut: None.
    """
    layers = [x for x in list_units(model, None, "count_slim_flops()") if not x.obstacle]
    keeps = {layer: keep for layer in layers if not (keep := layer.alive()).all()}
    if any(is_sharded(layer.read.tensor) for layer in keeps):
        return None
    put_back = snapshot(model.modules())
    try:
        cut_units(keeps)
        return count_flops(model, inputs, parameters)
    finally:
        put_back()

"""What a schedule prunes, single weights or whole units: how many there are, and how to."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from torch import Tensor
from torch.nn.utils.prune import BasePruningMethod

from torch_dimap.masking import (
    SINGLE_GROUP,
    Layer,
    Parameters,
    find_layers,
    global_module_aware_unstructured,
    unpruned_by_group,
)
from torch_dimap.units import UnitLayer, global_module_aware_structured, plan_units

MINIMUM, MULTIPLE = 1, 16  # units of a layer that stay, and what neurons stay in multiples of
Prunable = Parameters | Mapping[str, Iterable[UnitLayer]] | Iterable[UnitLayer]


class Weights(NamedTuple):
    """Groups of layers, whose weights are counted one by one."""

    groups: dict[str, list[Layer]]
    method: Callable[..., BasePruningMethod]

    def sizes(self) -> dict[str, int]:
        return {g: sum(x.parameter.numel() for x in own) for g, own in self.groups.items()}

    def most(self, caller: str) -> dict[str, int]:
        return self.sizes()

    def left(self) -> dict[str, int]:
        return unpruned_by_group(self.groups, "PruningSchedule")

    def masks(self) -> Iterator[Tensor | None]:
        return (layer.mask for own in self.groups.values() for layer in own)

    def prune(self, counts: Mapping[str, int]) -> dict[str, float]:
        pairs = {g: [(x.module, x.name) for x in own] for g, own in self.groups.items()}
        return global_module_aware_unstructured(pairs, self.method, amount=counts)


class Units(NamedTuple):
    """Groups of unit layers, whose heads and neurons are counted."""

    groups: dict[str, list[UnitLayer]]
    method: Callable[..., BasePruningMethod]

    def sizes(self) -> dict[str, int]:
        return {g: sum(layer.units for layer in own) for g, own in self.groups.items()}

    def most(self, caller: str) -> dict[str, int]:
        plan = plan_units(self.groups, None, MINIMUM, MULTIPLE, self.method, caller)
        left = plan.unmasked
        return {g: n - left[g] + plan.most[g] for g, n in self.sizes().items()}

    def left(self) -> dict[str, int]:
        return {
            g: sum(int(layer.unmasked().count_nonzero()) for layer in own)
            for g, own in self.groups.items()
        }

    def masks(self) -> Iterator[Tensor | None]:
        return (layer.read.mask for own in self.groups.values() for layer in own)

    def prune(self, counts: Mapping[str, int]) -> dict[str, float]:
        done = global_module_aware_structured(
            self.groups, counts, None, MINIMUM, MULTIPLE, self.method
        )
        return {group: kept.threshold for group, kept in done.items()}


def find_prunable(parameters: Any, method: Any, caller: str) -> Weights | Units:
    """Tell weights from units by the first of them; each call checks its own."""
    groups = parameters if isinstance(parameters, Mapping) else {SINGLE_GROUP: parameters}
    groups = {
        group: list(members) if isinstance(members, Iterable) else members
        for group, members in groups.items()
    }
    first = next((x for own in groups.values() if isinstance(own, list) for x in own), None)
    if isinstance(first, UnitLayer):
        return Units(groups, method)
    return Weights(find_layers(groups, caller), method)

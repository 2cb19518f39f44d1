"""The prunable tensors of a model by name, and what pruning has left of them."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from torch import Tensor, nn

from torch_dimap.masking import SINGLE_GROUP, Pair, group_parameters


class Layer(NamedTuple):
    """One prunable tensor."""

    label: str  # its name in the state dict, without the "_orig" of a pruned one
    module: nn.Module
    name: str

    @property
    def parameter(self) -> nn.Parameter:
        """The dense values; behind the mask where the tensor is pruned."""
        return getattr(self.module, self.name if self.mask is None else f"{self.name}_orig")

    @property
    def mask(self) -> Tensor | None:
        return self.module._buffers.get(f"{self.name}_mask")

    @property
    def weight(self) -> Tensor:
        """The values that count: never the attribute, which is stale until a forward."""
        values = self.parameter.detach()
        return values if self.mask is None else values * self.mask.to(values.dtype)


def find_layers(
    model: nn.Module,
    parameters: Mapping[str, Iterable[Pair]] | Iterable[Pair] | None,
    caller: str,
) -> dict[str, list[Layer]]:
    """Name the tensors of ``parameters`` (default: all groups of the model), by group."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{caller}: model must be an nn.Module, found {type(model).__name__}.")
    if parameters is None:
        parameters = group_parameters(model)
    elif isinstance(parameters, nn.Module) or not isinstance(parameters, Iterable):
        raise TypeError(
            f"{caller}: parameters must be a mapping group -> (module, name) pairs, or an "
            f"iterable of pairs, found {type(parameters).__name__}: see group_parameters(model)."
        )
    listed = parameters if isinstance(parameters, Mapping) else {SINGLE_GROUP: parameters}
    names = {module: name for name, module in model.named_modules()}
    groups = {
        group: [_layer(pair, names, f"{caller}: parameters[{group!r}]") for pair in pairs]
        for group, pairs in listed.items()
    }
    labels: dict[int, str] = {}
    for layer in (layer for layers in groups.values() for layer in layers):
        if id(layer.parameter) in labels:
            first = labels[id(layer.parameter)]
            raise ValueError(
                f"{caller}: {layer.label} is the same tensor as {first}: list it once."
            )
        labels[id(layer.parameter)] = layer.label
    return groups


def _layer(pair: Pair, names: Mapping[nn.Module, str], where: str) -> Layer:
    if not (
        isinstance(pair, (tuple, list))
        and len(pair) == 2
        and isinstance(pair[0], nn.Module)
        and isinstance(pair[1], str)
    ):
        raise TypeError(f"{where} must hold (module, name) pairs, found {type(pair).__name__}.")
    module, name = pair
    if module not in names:
        raise ValueError(
            f"{where} lists a {type(module).__name__} that is no part of the model: "
            "group the parameters of this very model."
        )
    label = ".".join(filter(None, (names[module], name)))
    base = name.removesuffix("_orig")
    if base != name and f"{base}_mask" in module._buffers:
        raise ValueError(f"{where} lists {label}, which is behind a mask: name {base!r} instead.")
    behind = f"{name}_orig" if f"{name}_mask" in module._buffers else name
    parameter = module._parameters.get(behind)
    if parameter is None:
        raise ValueError(f"{where} lists {label}, which is no parameter of the model.")
    if parameter.is_meta:
        raise ValueError(
            f"{where}: {label} is on the meta device and has no values: load weights first."
        )
    return Layer(label, module, name)


def check_thresholds(thresholds: object, groups: Iterable[str], caller: str) -> None:
    """Raise unless ``thresholds`` is None, or some groups' finite numbers."""
    if thresholds is None:
        return
    if not isinstance(thresholds, Mapping):
        raise TypeError(
            f"{caller}: thresholds must be a mapping group -> threshold, as the pruning call "
            f"returned it, found {type(thresholds).__name__}."
        )
    unknown = [group for group in thresholds if group not in groups]
    if unknown:
        raise ValueError(
            f"{caller}: thresholds must be for the groups {list(groups)}, found {unknown[0]!r}."
        )
    for group, threshold in thresholds.items():
        if not isinstance(threshold, numbers.Real) or not math.isfinite(threshold):
            raise ValueError(
                f"{caller}: thresholds[{group!r}] must be a finite number, as the pruning call "
                f"returned it, found {threshold!r}."
            )

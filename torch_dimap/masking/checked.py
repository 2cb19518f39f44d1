"""The layers of a pruning call, found and checked, or refused in all processes that hold them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from torch_dimap.masking.layers import Layer
from torch_dimap.masking.targets import Parameters, find_layers
from torch_dimap.masking.values import Scores, check_values
from torch_dimap.sharding import processes_of, refuse_everywhere, rest_sharded, tied_names


def find_checked(
    parameters: Parameters, importance_scores: Scores | None, caller: str
) -> tuple[dict[str, list[Layer]], dict[str, list[Tensor]]]:
    """Return by group the layers of a call, and what to rank them by, see ``check_values``."""
    parameters = listed(parameters)
    try:
        groups = find_layers(parameters, caller)
        _refuse_tied([x for layers in groups.values() for x in layers], caller)
    except Exception as error:
        # The others are at the checks of check_values, and learn of it there.
        refuse_everywhere(processes_of(_parameters_in(parameters), caller), error, caller)
    return groups, check_values(groups, importance_scores, caller)


def _refuse_tied(layers: list[Layer], caller: str) -> None:
    tied = tied_names(layer.module for layer in layers)
    for layer in layers:
        if (layer.module, layer.name) in tied:
            raise ValueError(
                f"{caller}: {layer.label} is tied to another layer's, and fully_shard keeps the "
                "weight at the first of them: name that one."
            )


def listed(given: Any) -> Any:
    """Keep what can be read only once: what was given, or what of it belongs to each group."""
    if isinstance(given, Mapping):
        return {group: listed(members) for group, members in given.items()}
    return list(given) if isinstance(given, Iterator) else given


def _parameters_in(parameters: Any) -> Iterator[Tensor]:
    """Yield the parameters of modules in what may hold wrong pairs, and other things."""
    for pairs in parameters.values() if isinstance(parameters, Mapping) else [parameters]:
        for pair in pairs if isinstance(pairs, (list, tuple)) else ():
            if isinstance(pair, (list, tuple)) and pair and isinstance(pair[0], nn.Module):
                rest_sharded([pair[0]])
                yield from pair[0].parameters(recurse=False)

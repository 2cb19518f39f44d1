"""What a call is asked to prune or to look at, checked in full before anything is changed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import nn

from torch_dimap.masking.grouping import group_parameters
from torch_dimap.masking.layers import Layer, Pair, computed_by, pruning_methods
from torch_dimap.masking.readers import Place, note_readers, survey
from torch_dimap.sharding import agree, is_sharded, layout_of, processes_of, rest_sharded
from torch_dimap.text import name_some

SINGLE_GROUP = "all"  # what a flat iterable of pairs is called

Parameters = Mapping[str, Iterable[Pair]] | Iterable[Pair]


def find_layers_in(
    model: nn.Module, parameters: Parameters | None, caller: str
) -> dict[str, list[Layer]]:
    """Resolve pairs of a model, by default all of its groups; note who reads their weights.

    Of a sharded model all processes must ask, and all raise if one of them does.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"{caller}: model must be an nn.Module, found {type(model).__name__}.")
    rest_sharded(model.modules())

    def find() -> tuple[dict[str, list[Layer]], object]:
        pairs = group_parameters(model) if parameters is None else parameters
        groups = find_layers_here(model, pairs, caller)
        return groups, {group: [x.label for x in layers] for group, layers in groups.items()}

    return agree(processes_of(model.parameters(), caller), find, caller)


def find_layers_here(
    model: nn.Module, parameters: Parameters, caller: str, argument: str = "parameters"
) -> dict[str, list[Layer]]:
    """Resolve pairs of a model in this process alone; note who reads their weights."""
    places = survey(model)
    groups = find_layers(parameters, caller, places, argument)
    for layer in (layer for layers in groups.values() for layer in layers):
        note_readers(layer.module, places[layer.module].readers)
    return groups


def find_layers(
    parameters: Parameters,
    caller: str,
    places: Mapping[nn.Module, Place] | None = None,
    argument: str = "parameters",
) -> dict[str, list[Layer]]:
    """Resolve the pairs that a call was given, by group.

    Args:
        parameters: as :func:`torch_dimap.global_module_aware_unstructured` takes it.
        caller: the function that was called, for messages.
        places: the modules of the model, where that is known; others are refused.
        argument: what the caller calls the parameters, for messages.
    """
    if isinstance(parameters, nn.Module) or not isinstance(parameters, Iterable):
        raise TypeError(
            f"{caller}: {argument} must be a mapping group -> (module, name) pairs, or an iterable "
            f"of pairs, found {type(parameters).__name__}: see group_parameters(model)."
        )
    flat = not isinstance(parameters, Mapping)
    listed = parameters if isinstance(parameters, Mapping) else {SINGLE_GROUP: parameters}
    groups: dict[str, list[Layer]] = {}
    for group, pairs in listed.items():
        where = argument if flat else f"{argument}[{group!r}]"
        if isinstance(pairs, nn.Module) or not isinstance(pairs, Iterable):
            raise TypeError(
                f"{caller}: {where} must be an iterable of (module, name) pairs, "
                f"found {type(pairs).__name__}."
            )
        groups[group] = [
            _find_layer(pair, f"{where}[{i}]", caller, places) for i, pair in enumerate(pairs)
        ]
    layers = [layer for of_group in groups.values() for layer in of_group]
    rest_sharded(layer.module for layer in layers)
    for layer in layers:
        check_layer(layer, caller)
    _refuse_repeats(layers, caller)
    return groups


def _find_layer(
    pair: Pair, where: str, caller: str, places: Mapping[nn.Module, Place] | None
) -> Layer:
    if not (
        isinstance(pair, (tuple, list))
        and len(pair) == 2
        and isinstance(pair[0], nn.Module)
        and isinstance(pair[1], str)
    ):
        raise TypeError(
            f"{caller}: {where} must be a (module, name) pair, found {type(pair).__name__}."
        )
    module, name = pair
    if places is None:
        return Layer(f"{where} ({type(module).__name__}.{name})", module, name)
    if module not in places:
        raise ValueError(
            f"{caller}: {where} lists a {type(module).__name__} that is no part of the model: "
            "group the parameters of this very model."
        )
    return Layer(f"{places[module].name}.{name}".removeprefix("."), module, name)


def check_layer(layer: Layer, caller: str) -> None:
    """Raise unless a layer is a parameter that a mask can be put on, or has one that holds."""
    label, module, name = layer
    if isinstance(module, torch.jit.ScriptModule):
        raise ValueError(
            f"{caller}: {label} is part of a scripted module, which takes no masks: "
            "prune the model and bake it with remove_all before it is scripted."
        )
    computed = computed_by(module, name)
    if computed:
        raise ValueError(
            f"{caller}: {label} is computed by {computed[0]}, not a parameter: remove that "
            f"first with torch.nn.utils.{computed[1]}."
        )
    hooks = sum(method._tensor_name == name for method in pruning_methods(module))
    parts = module._parameters.get(f"{name}_orig"), module._buffers.get(f"{name}_mask")
    present = sum(part is not None for part in parts)
    if not hooks and not present:
        _check_unpruned(layer, caller)
    elif hooks != 1 or present != 2:
        raise RuntimeError(
            f"{caller}: {label} was pruned before, but incompletely: expected one parameter "
            f"{name}_orig, one buffer {name}_mask and one pruning hook, found {hooks} "
            "hooks: build the model again and load its weights."
        )
    _check_kind(layer.parameter, f"{caller}: {label}")


def _check_unpruned(layer: Layer, caller: str) -> None:
    label, module, name = layer
    base = name.removesuffix("_orig")
    if base != name and f"{base}_mask" in module._buffers:
        raise ValueError(
            f"{caller}: {label} holds the weights behind a mask: name the pruned tensor, {base!r}."
        )
    if module._parameters.get(name) is not None:
        return
    if "quantized" in type(module).__module__:
        raise ValueError(
            f"{caller}: {label} is packed by quantization, which takes no masks: prune the model "
            "and bake it with remove_all before it is quantized."
        )
    present = [key for key, value in module._parameters.items() if value is not None]
    raise ValueError(
        f"{caller}: {label} must be a parameter of its module, found none of that name; "
        f"there are {name_some(present) or 'none'}."
    )


def _check_kind(parameter: nn.Parameter, what: str) -> None:
    """Refuse tensors that are more than a block of numbers, which a mask would not fit."""
    if is_sharded(parameter):
        layout_of(parameter, False, what)
    elif getattr(parameter, "_fsdp_flattened", False):  # by which torch marks them
        raise ValueError(
            f"{what} is a piece of a flat parameter of FullyShardedDataParallel, which differs "
            "in each process: shard the model with fully_shard, whose weights keep their shapes."
        )
    elif hasattr(parameter, "__tensor_flatten__"):  # torch's sign of tensors made of others
        raise ValueError(
            f"{what} must be stored as plain numbers, found {type(parameter).__name__}: prune the "
            "model and bake it with remove_all before it is quantized or otherwise converted."
        )
    if parameter.layout != torch.strided:
        raise ValueError(
            f"{what} must be a dense tensor, found the layout {parameter.layout}: "
            "make it dense with to_dense()."
        )
    if parameter.is_meta:
        raise ValueError(f"{what} is on the meta device and has no values: load weights first.")


def _refuse_repeats(layers: list[Layer], caller: str) -> None:
    seen: dict[tuple[torch.device, int], str] = {}
    for layer in layers:
        parameter = layer.parameter
        if not parameter.numel():
            continue
        # Of a sharded one a process may hold nothing, and all must find the same.
        where = id(parameter) if is_sharded(parameter) else parameter.data_ptr()
        first = seen.setdefault((parameter.device, where), layer.label)
        if first is not layer.label:
            raise ValueError(
                f"{caller}: {layer.label} is the same tensor as {first}: list it once."
            )


def refuse_taken_names(layer: Layer, caller: str) -> None:
    """Raise if the names that torch's pruning gives to a dense layer's parts are in use."""
    for taken in (f"{layer.name}_orig", f"{layer.name}_mask"):
        if layer.mask is None and hasattr(layer.module, taken):
            raise ValueError(
                f"{caller}: {layer.label} needs the name {taken} for itself, but its module "
                "already has an attribute of that name: rename that."
            )

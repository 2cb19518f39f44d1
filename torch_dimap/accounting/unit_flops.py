"""What one unit of a layer costs, found by counting a copy that has one unit less."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from torch_dimap.accounting.flops import flops_by_module
from torch_dimap.accounting.inputs import Inputs, arguments_for
from torch_dimap.masking import pruning_methods, refuse_sharded_model, remove_all, snapshot
from torch_dimap.units import UnitLayer, cut_units


def count_unit_flops(
    model: nn.Module,
    inputs: Inputs,
    layers: Iterable[UnitLayer],
    caller: str = "count_unit_flops()",
) -> tuple[int, list[UnitLayer]]:
    """Count the multiply-adds of a model and of one unit in each of its layers.

    Multiply-adds are those of :func:`torch_dimap.count_flops`, whatever is masked or zero.
    A unit's are all that go with it: the weights that make it and read it, and a head's
    products of queries, keys and values. So removing ``k`` units of a layer saves exactly
    ``k`` times as many, as long as one of them stays.

    Args:
        model: the model; it is only read.
        inputs: what to call it with.
        layers: unit layers of the model, as :func:`torch_dimap.group_units` lists them.
        caller: whom an error names.

    Returns:
        The multiply-adds of the whole model, and the layers with ``multiply_adds`` set.

    Raises:
        TypeError: for ``inputs`` that no model can be called with.
        ValueError: for a layer of another model.
        NotImplementedError: if multiply-adds cannot be counted.
    """
    one_less = {layer: torch.arange(layer.units) < layer.units - 1 for layer in layers}
    whole, costs = count_savings(model, inputs, one_less, caller)
    return whole, [layer._replace(multiply_adds=cost) for layer, cost in costs.items()]


def count_savings(
    model: nn.Module,
    inputs: Inputs,
    keeps: Mapping[UnitLayer, Tensor],
    caller: str,
) -> tuple[int, dict[UnitLayer, int]]:
    """Count a model's multiply-adds, and how many each layer saves if it keeps only so much."""
    refuse_sharded_model(model, caller)  # of which there are no smaller copies
    names = names_in(model, keeps, caller)
    inputs = arguments_for(model, inputs, caller)
    whole = flops_by_module(model, inputs)
    fewer = flops_by_module(slim_copy(model, keeps), inputs)
    saved = [whole[name] - fewer[name] for name in names]
    if sum(saved) != whole[""] - fewer[""]:  # one layer's module works inside another's
        saved = [
            whole[""] - flops_by_module(slim_copy(model, {layer: keep}), inputs)[""]
            for layer, keep in keeps.items()
        ]
    return int(whole[""]), dict(zip(keeps, map(int, saved)))


def names_in(model: nn.Module, layers: Iterable[UnitLayer], caller: str) -> list[str]:
    """Return the names that the layers' modules have in the model that is to be counted."""
    names = {module: name for name, module in model.named_modules()}
    for layer in layers:
        if layer.module not in names:
            raise ValueError(
                f"{caller}: units must be those of the model, found {layer.name} of another: "
                "call group_units(model)."
            )
    return [names[layer.module] for layer in layers]


def slim_copy(model: nn.Module, keeps: Mapping[UnitLayer, Tensor]) -> nn.Module:
    """Copy a model, bake the copy's masks, and cut it down to the units that are to stay."""
    modules = [m for m in model.modules() if not isinstance(m, torch.jit.ScriptModule)]
    put_back = snapshot(modules)
    try:
        for module in modules:
            for method in pruning_methods(module):
                # After a training step it carries a graph, which torch refuses to copy.
                vars(module)[method._tensor_name] = None
        copied, layers = copy.deepcopy((model, list(keeps)))
    finally:
        put_back()
    remove_all(copied)
    cut_units(dict(zip(layers, keeps.values())))
    return copied

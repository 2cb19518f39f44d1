"""What ``fully_shard`` knows of a model's parameters: the one file that looks inside of it.

It registers the shards of a parameter, or the gathered whole, on its module under the name that
the parameter had. A mask gives it another one, ``weight_orig``, which must be told there.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from torch_dimap.sharding.layout import is_sharded, spread

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def rest_sharded(modules: Iterable[nn.Module]) -> None:
    """Have the parameters of modules sharded again where a forward has left them gathered."""
    wanted = set(modules)
    for state in _states():
        if any(info.module in wanted for info in _infos(state)):
            for group in _groups(state):
                group._to_sharded()  # as for state_dict(): reshard() does nothing after a failure


def managed_names(modules: Iterable[nn.Module]) -> dict[tuple[nn.Module, str], Any]:
    """Return by module and name what must be told when a parameter is renamed."""
    wanted = set(modules)
    return {
        (info.module, info.param_name): info
        for state in _states()
        for info in _infos(state)
        if info.module in wanted
    }


def tied_names(modules: Iterable[nn.Module]) -> set[tuple[nn.Module, str]]:
    """Return by module and name the further places of tied parameters, which cannot be renamed."""
    wanted = set(modules)
    return {
        place
        for state in _states()
        for info in _infos(state)
        for place in zip(info.shared_modules, info.shared_param_names)
        if place[0] in wanted
    }


def spread_by_plan(model: nn.Module) -> list[str]:
    """Name the parameters that something else than ``fully_shard`` has spread, or both have."""
    infos = [
        x._module_info
        for state in _states()
        for group in _groups(state)
        for x in group.fsdp_params
        if not x.is_dtensor  # before it was sharded
    ]
    alone = {(info.module, info.param_name) for info in infos} | tied_names(model.modules())
    return [
        f"{place}.{name}".removeprefix(".")
        for place, module in model.named_modules()
        for name, parameter in module._parameters.items()
        if is_sharded(parameter) and (module, name) not in alone
    ]


def rename(
    managed: Mapping[tuple[nn.Module, str], Any], module: nn.Module, old: str, new: str
) -> None:
    """Tell ``fully_shard`` the new name of a parameter, if it is among those that it manages."""
    info = managed.get((module, old))
    if info is not None:
        info.param_name = new


def gathers(hook: Any) -> bool:
    """Tell the hooks by which ``fully_shard`` gathers for a forward, and lets go after it."""
    return _state_of(hook) is not None


def _state_of(hook: Any) -> Any:
    """Return whose hook it is, if it is one of those; for a list of modules they are wrapped."""
    while hook is not None:
        state = getattr(hook, "__self__", None)
        if type(state).__name__ == "FSDPState":
            return state
        hook = getattr(hook, "__wrapped__", None)
    return None


def gathering_methods(module: nn.Module) -> dict[str, Callable]:
    """Return by name what gathers a module's weights while it runs, as it was before it did so.

    That is ``forward``, and what ``register_fsdp_forward_method`` was told; nothing if
    ``fully_shard`` was not called on the module.
    """
    if not any(map(gathers, module._forward_pre_hooks.values())):
        return {}
    methods = {"forward": module.forward}
    for name, method in vars(module).items():
        code = getattr(getattr(method, "__func__", None), "__code__", None)
        if code is not None and code.co_name == "wrapped_method" and "fsdp" in code.co_filename:
            methods[name] = method.__wrapped__
    return methods


def casts_inputs(module: nn.Module) -> bool:
    """Say whether ``fully_shard`` casts a module's inputs to the dtype of its gathered weights."""
    states = filter(None, map(_state_of, module._forward_pre_hooks.values()))
    policies = [state._mp_policy for state in states]
    return any(x.cast_forward_inputs and x.param_dtype is not None for x in policies)


def gathered(mask: DTensor, like: Tensor) -> Tensor:
    """Return of a sharded mask what ``fully_shard`` has gathered of its weight.

    Args:
        mask: laid out as the weight while that is sharded.
        like: the weight as it is in a forward: whole, or what a tensor-parallel plan leaves.
    """
    whole = like.to_local() if is_sharded(like) else like
    kept = like.device_mesh.mesh_dim_names if is_sharded(like) else ()
    part = mask.to_local().to(whole.device)
    names = mask.device_mesh.mesh_dim_names
    for i, placement in enumerate(mask.placements):
        dimension = getattr(placement, "dim", None)  # none where it is replicated
        if dimension is not None and not (names and kept and names[i] in kept):
            part = _gather(part, dimension, whole.shape[dimension], mask.device_mesh, i)
    return spread(part, like) if is_sharded(like) else part


def _gather(part: Tensor, dimension: int, size: int, mesh: Any, i: int) -> Tensor:
    """Join the parts of all processes along one dimension of a mesh."""
    length = -(-size // mesh.size(i))  # of a part, but for the last ones
    own = part.movedim(dimension, 0)
    padded = own.new_zeros((length, *own.shape[1:]))
    padded[: len(own)] = own
    parts = [torch.empty_like(padded) for _ in range(mesh.size(i))]
    dist.all_gather(parts, padded, group=mesh.get_group(i))
    return torch.cat(parts)[:size].movedim(0, dimension)


def _states() -> Iterator[Any]:
    """Yield what ``fully_shard`` keeps of the modules it was called on."""
    composable = sys.modules.get("torch.distributed._composable_state")
    references = getattr(composable, "_module_state_mapping", {})
    seen = set()
    for reference in list(references.values()):
        state = reference() if callable(reference) else reference
        if id(state) not in seen and type(state).__name__ == "FSDPState":
            seen.add(id(state))
            yield state


def _groups(state: Any) -> list[Any]:
    """Return the groups in which a state gathers its parameters."""
    groups = getattr(state, "_fsdp_param_groups", None)
    if groups is None:  # torch before 2.11
        groups = [state._fsdp_param_group] if state._fsdp_param_group else []
    return groups


def _infos(state: Any) -> Iterator[Any]:
    """Yield where the parameters that a state manages are registered: modules and names."""
    return (x._module_info for group in _groups(state) for x in group.fsdp_params)

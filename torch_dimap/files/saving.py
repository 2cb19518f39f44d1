"""Pruned and slim models put on disk: masks as bits and only the values that they keep."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from torch_dimap.accounting import check_thresholds
from torch_dimap.files.operations import operations_of
from torch_dimap.masking import Layer, builtin_rule, pruned_tensors
from torch_dimap.selection import threaded_map
from torch_dimap.sharding import Whole, agree, lend_to_first, local_of, processes_of
from torch_dimap.storage import NAMES, Entry, check_target, entry_of, masked, write_weights
from torch_dimap.units import UnitRule


def save_pruned(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    masks_only: bool = False,
    hash_weights: bool = False,
    thresholds: Mapping[str, float] | None = None,
    force: bool = False,
    unit_rule: UnitRule | None = None,
) -> None:
    """Save a pruned model, each pruned tensor as a mask of bits and the values it keeps.

    A slim model, see :func:`torch_dimap.remove_units`, is saved with the numbers of units
    that its layers have left, so that :func:`load_pruned` can slim a fresh dense one.

    The file is safetensors, its layout is told in ``docs/format.md``. What is kept of
    ``weight_orig * weight_mask`` comes back bit for bit; what is not comes back as +0.0,
    where the product may be -0.0. The values behind the zeros are not saved: to go on
    with them, save ``model.state_dict()``. Tensors that share their memory are saved
    under each of their names. On failure the file is as it was before.

    Of a model that is sharded (``fully_shard``, a tensor-parallel plan) the file is the same,
    byte for byte. All of its processes make the call; the first of them gets one whole tensor
    at a time, on the CPU, and writes. What fails there fails in all.

    Args:
        model: with masks, so save before :func:`torch_dimap.remove_all`; or slim, then
            with masks or without. On any device.
        path: where to, in the first process. A symbolic link is followed, and what it points
            to is replaced.
        masks_only: save the masks alone, one bit per weight, with hashes of the weights
            behind them: the only ones that :func:`load_pruned` will then apply them to.
            Those are the weights as they are now; for masks of a published checkpoint,
            save them before training.
        hash_weights: note these hashes (SHA-256) in a file with values too.
        thresholds: group -> threshold, as the pruning call returned them, to be noted. The
            groups are those that the layers' names speak of, as in ``group_parameters``.
        force: replace a file that exists.
        unit_rule: the ``rule`` that units were removed with, if one was given.

    Raises:
        TypeError: if ``model`` is no module, or ``thresholds`` no mapping.
        ValueError: if it is neither pruned nor slim, if its layers are not as
            ``remove_units`` left them, if a pruned weight is tied to one that is
            not, if its state dict holds what is no plain tensor, for thresholds of
            other groups or that are no finite numbers, or if processes ask for different files.
        RuntimeError: if an earlier pruning of a tensor is incomplete.
        OSError: if the file exists without ``force``, or the disk refuses.

    Example:
        >>> import tempfile
        >>> from torch.nn.utils import prune
        >>> from torch_dimap import load_pruned
        >>> net = nn.Sequential(nn.Linear(20, 10))
        >>> _ = prune.l1_unstructured(net[0], "weight", amount=0.5)
        >>> path = tempfile.mkdtemp() + "/net.safetensors"
        >>> save_pruned(net, path)
        >>> fresh = load_pruned(nn.Sequential(nn.Linear(20, 10)), path)
        >>> torch.equal(fresh[0].weight, net[0].weight)
        True
    """
    caller = "save_pruned()"
    if not isinstance(model, nn.Module):
        raise TypeError(f"{caller}: model must be an nn.Module, found {type(model).__name__}.")
    layers = {layer.label: layer for layer in pruned_tensors(model, caller)}
    state = model.state_dict()
    processes = processes_of((x for x in state.values() if isinstance(x, Tensor)), caller)

    def check() -> tuple[tuple[Any, dict[str, Any]], object]:
        operations = operations_of(model, unit_rule, caller)
        if not layers and not (operations and not masks_only):
            raise ValueError(
                f"{caller}: the model must have masks, found no pruned tensor in it: save before "
                "remove_all, or use prune_checkpoint on the file of a dense model."
            )
        entries = _entries_of(state, layers, state.__getitem__, caller)
        groups = _groups_of(model, layers)
        check_thresholds(thresholds, list(dict.fromkeys(groups.values())), caller)
        kinds = {name: (entry.kind, entry.masked) for name, entry in entries.items()}
        writes = processes is None or processes.rank == 0
        target = check_target(path, caller, force) if writes else None
        how = {
            "content": "masks" if masks_only else "compressed" if layers else "dense",
            "group_of": groups,
            "thresholds": {group: float(value) for group, value in (thresholds or {}).items()},
            "hashed": masks_only or hash_weights,
            # Masks alone are for a model with just these weights, which is slim already.
            "operations": None if masks_only else operations,
        }
        return (target, how), (kinds, how)

    target, how = agree(processes, check, caller)

    def write(whole: Whole) -> None:
        entries = _entries_of(state, layers, whole, caller)
        with threaded_map(len(entries), on_cpu=processes is None) as map_:
            write_weights(target, entries, map_=map_, **how)

    lend_to_first(processes, state, write, caller)


def _groups_of(model: nn.Module, layers: Iterable[str]) -> dict[str, str]:
    """Return to which groups pruned tensors belong, by the built-in rule."""
    modules = dict(model.named_modules(remove_duplicate=False))
    found = {}
    for label in layers:
        place, _, name = label.rpartition(".")
        found[label] = builtin_rule(place, modules[place], name)
    return {label: group for label, group in found.items() if group is not None}


def _entries_of(
    state: Mapping[str, Any], layers: Mapping[str, Layer], whole: Whole, caller: str
) -> dict[str, Entry]:
    """Return a model's state dict as entries, originals and masks joined."""
    entries: dict[str, Entry] = {}
    for key, value in state.items():
        if key.removesuffix("_mask") in layers:
            continue
        if not isinstance(value, Tensor) or value.is_meta or value.dtype not in NAMES:
            kind = f"{value.dtype} on {value.device}" if isinstance(value, Tensor) else type(value)
            raise ValueError(
                f"{caller}: the model's state must be plain tensors with values, found {key}, "
                f"{kind}."
            )
        label = key.removesuffix("_orig")
        entries[label if label in layers else key] = entry_of(value, partial(whole, key))
    for label in layers:
        mask = state[f"{label}_mask"]
        own = local_of(mask)
        if mask.dtype != torch.bool and not bool(torch.all((own == 0) | (own == 1))):
            raise ValueError(f"{caller}: the mask of {label} must hold 0 and 1 only: binarize it.")
        read = partial(whole, f"{label}_mask")
        entries[label] = masked(entries[label], entry_of(mask, read))
    behind = {entry.memory: name for name, entry in entries.items() if entry.masked}
    for name, entry in entries.items():
        if not entry.masked and entry.memory is not None and entry.memory in behind:
            raise ValueError(
                f"{caller}: {name} must not share its values with the pruned "
                f"{behind[entry.memory]}, which it does: untie it, give one a copy as nn.Parameter."
            )
    return entries

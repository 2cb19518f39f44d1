"""Pruned and slim models read from disk into a dense model, or as a state dict."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from contextlib import ExitStack
from typing import overload

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from torch_dimap.files.operations import modules_of
from torch_dimap.files.planning import Plan, plan_load
from torch_dimap.masking import all_or_nothing, attach, hold_masks, pruned_tensors
from torch_dimap.selection import threaded_map
from torch_dimap.sharding import (
    Whole,
    agree,
    is_sharded,
    lend_to_first,
    local_of,
    part_like,
    processes_of,
)
from torch_dimap.storage import (
    Checkpoint,
    Entry,
    Pruned,
    bits_of,
    entry_of,
    fill,
    name_of,
    open_weights,
    read_mask,
    read_values,
    refuse_masks_alone,
)
from torch_dimap.text import name_some
from torch_dimap.units import UnitRule, cut_units


@overload
def load_pruned(
    model_or_path: Checkpoint, *, device: torch.device | str = "cpu"
) -> dict[str, Tensor]: ...


@overload
def load_pruned(
    model_or_path: nn.Module,
    path: Checkpoint,
    *,
    masked: bool = False,
    unit_rule: UnitRule | None = None,
) -> nn.Module: ...


def load_pruned(model_or_path, path=None, *, masked=False, unit_rule=None, device="cpu"):
    """Load what :func:`save_pruned` or :func:`torch_dimap.prune_checkpoint` wrote.

    ``load_pruned(path)`` gives a plain state dict; ``load_pruned(model, path)`` fills a
    dense model, and with ``masked=True`` its masks too, ready to be fine-tuned. From the
    file of a slim model, whose layers have lost units, as many are cut out of the model
    first, which gives it new parameters. On failure the model is as it was.
    Where a framework fills the model, :func:`torch_dimap.prune_like` readies it for that.

    A sharded model (``fully_shard``, a tensor-parallel plan) is filled in place as well. All
    of its processes make the call; each reads the file one tensor at a time and keeps its own
    part, so that none ever holds the model whole: start on the meta device, shard, and call
    ``model.to_empty(device=...)``. A disk that fails there in the midst leaves values of both.

    Args:
        model_or_path: a dense model with the names and shapes of the one that was saved,
            or that this had before it was slimmed, on any device; its tensors are filled
            in place and, as by torch's ``load_state_dict``, keep their dtypes. Or the path.
        path: of the file. Any other checkpoint with these weights will do as well, also a
            folder of the Hugging Face hub, or a state dict in memory. Names may have a
            wrapper's prefix, here or there (``model.``, ``module.``, ``_orig_mod.``), or be
            those that transformers renames. With masks alone, they are put on the weights
            that the model has.
        masked: keep the masks, as torch does: ``<name>_orig``, ``<name>_mask``, and a hook
            that holds the zeros. Otherwise the zeros are ordinary weights.
        unit_rule: the ``rule`` that units were removed with, if one was given.
        device: of the tensors, where a state dict is asked for.

    Returns:
        Name -> tensor; or the model.

    Raises:
        TypeError: for arguments of other types.
        ValueError: if the file is damaged, does not fit the model, holds masks of other
            weights than the model's, none where ``masked`` wants them, or fewer units than a
            sharded model; or if processes read different files.
        RuntimeError: if the model is pruned already.
        OSError: if the file cannot be read.
    """
    caller = "load_pruned()"
    if not isinstance(model_or_path, nn.Module):
        if path is not None or masked or unit_rule is not None:
            raise TypeError(
                f"{caller}: expected a path alone, or a model, its path and options, found "
                f"{type(model_or_path).__name__} in the model's place."
            )
        return _load_state(model_or_path, device)
    if path is None:
        raise TypeError(f"{caller}: expected a path besides the model, found none.")
    _load_into(model_or_path, path, masked, unit_rule, caller)
    return hold_masks(model_or_path)


def _load_into(
    model: nn.Module, path: Checkpoint, masked: bool, unit_rule: UnitRule | None, caller: str
) -> None:
    """Fill a dense model with what a file holds."""
    already = next(pruned_tensors(model, caller), None)
    if already is not None:
        raise RuntimeError(
            f"{caller}: the model must be dense, found {already.label} pruned already: build it "
            "again, or call remove_all (or prune_like, and the model's own load_state_dict)."
        )
    where = f"{caller}: {name_of(path)}"
    processes = processes_of((*model.parameters(), *model.buffers()), caller)
    with ExitStack() as stack:

        def look() -> tuple[Plan, object]:
            weights = stack.enter_context(open_weights(path, in_memory=processes is None))
            plan = plan_load(model, weights, masked, unit_rule, where, stack)
            if processes is not None and (plan.keeps or plan.replaces):
                raise ValueError(
                    f"{where} changes the layers of the model, which must be whole for that, "
                    "found it sharded: load the file before fully_shard."
                )
            kinds = {name: (entry.kind, entry.masked) for name, entry in plan.entries.items()}
            return plan, (kinds, weights.record, masked)

        plan = agree(processes, look, caller)

        def check(whole: Whole) -> None:
            _check_hashes(whole, plan.hashes, processes is None, where)

        def change() -> tuple[None, None]:
            _change(model, plan, masked)
            return None, None

        lend_to_first(processes, plan.own, check, caller)
        changed = [*(x.module for x in plan.targets.values()), *modules_of(plan.keeps)]
        stack.enter_context(all_or_nothing(changed))
        agree(processes, change, caller)


def _change(model: nn.Module, plan: Plan, masked: bool) -> None:
    """Do it: each process to the parts that it holds."""
    own, entries = plan.own, plan.entries
    read = plan.targets or (entries if plan.masks_alone else ())
    masks = {
        name: part_like(read_mask(entries[name]), own[name]).to(own[name].device) for name in read
    }
    if plan.keeps or plan.replaces:
        # The model changes before it is filled: nothing may be left to go wrong.
        entries = {name: entry_of(read_values(entry)) for name, entry in entries.items()}
    if plan.keeps:
        cut_units(plan.keeps)
        own = model.state_dict()
    with torch.no_grad():
        if not plan.masks_alone:
            with threaded_map(len(entries)) as map_:
                for _ in map_(_put, own.values(), map(entries.get, own)):
                    pass  # where threads share the work, their errors come out
        elif not masked:
            for name, mask in masks.items():
                local_of(own[name]).masked_fill_(~mask, 0.0)
    for name, target in plan.targets.items():
        attach(target, prune.Identity(), masks[name])


def _load_state(path: Checkpoint, device: torch.device | str) -> dict[str, Tensor]:
    with open_weights(path, in_memory=True) as weights:
        refuse_masks_alone(weights, f"load_pruned(): {name_of(path)}")
        return {name: read_values(entry).to(device) for name, entry in weights.entries.items()}


def _put(tensor: Tensor, entry: Entry) -> None:
    """Read an entry into a model's tensor, wherever and of whatever dtype that is."""
    same = tensor.is_contiguous() and tensor.dtype == entry.kind.dtype
    if same and tensor.device.type == "cpu" and not is_sharded(tensor):
        fill(entry, tensor)
    else:
        local_of(tensor).copy_(part_like(read_values(entry), tensor))


def _check_hashes(
    whole: Whole, hashes: Mapping[str, Pruned], threaded: bool, where: str
) -> None:
    """Raise unless a file's masks belong to these very weights."""

    def matches(name: str) -> bool:
        digest = hashlib.sha256()
        for values, _ in entry_of(whole(name)).blocks():
            digest.update(bits_of(values).view(np.uint8).data)
        return digest.hexdigest() == hashes[name].sha256

    with threaded_map(len(hashes), threaded) as map_:
        wrong = [name for name, right in zip(hashes, map_(matches, hashes)) if not right]
    if wrong:
        raise ValueError(
            f"{where} must hold masks of the model's weights, found that those of "
            f"{name_some(wrong)} were made for others: load the weights first that "
            "were behind the masks when they were saved."
        )

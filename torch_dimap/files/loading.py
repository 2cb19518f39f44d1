"""Pruned and slim models read from disk into a dense model, or as a state dict."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from typing import overload

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from torch_dimap.files.names import match_modules, match_names, own_place
from torch_dimap.files.operations import modules_of, plan_cuts, plan_replacements, shapes_after
from torch_dimap.masking import (
    Layer,
    all_or_nothing,
    attach,
    check_layer,
    hold_masks,
    pruned_tensors,
    refuse_taken_names,
)
from torch_dimap.operations import put
from torch_dimap.selection import threaded_map
from torch_dimap.storage import (
    Checkpoint,
    Entry,
    Operations,
    Pruned,
    Weights,
    bits_of,
    entry_of,
    fill,
    holds_masks_alone,
    name_of,
    open_weights,
    read_mask,
    read_values,
    refuse_masks_alone,
    refuse_quantised,
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
            weights than the model's, or none where ``masked`` wants them.
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
    model = model_or_path
    already = next(pruned_tensors(model, caller), None)
    if already is not None:
        raise RuntimeError(
            f"{caller}: the model must be dense, found {already.label} pruned already: build it "
            "again, or call remove_all (or prune_like, and the model's own load_state_dict)."
        )
    where = f"{caller}: {name_of(path)}"
    with open_weights(path, in_memory=True) as weights, ExitStack() as changes:
        # From here on nothing can be missing.
        masks_alone = holds_masks_alone(weights)
        refuse_quantised(weights.entries, where)
        names, operations = _find_places(model, weights, where)
        replacements = plan_replacements(model, operations, where)
        if replacements:
            changes.enter_context(all_or_nothing([site.block for site in replacements]))
            for site, made in replacements.items():
                put(site, made)
            names, _ = _find_places(model, weights, where)
        own = model.state_dict()
        entries = {names[name]: entry for name, entry in weights.entries.items() if name in names}
        keeps = plan_cuts(model, operations, unit_rule, where)
        _check_fit(own, shapes_after(model, own, keeps), entries, masks_alone, caller)
        wanted = [name for name, entry in entries.items() if entry.masked]
        targets = layers_to_mask(model, wanted, caller) if masked else {}
        if masked and not targets:
            raise ValueError(
                f"{where} must have masks for masked=True, found whole tensors only: leave it "
                "out, and prune the model again if it is to keep its zeros."
            )
        if weights.record and masks_alone:
            pruned = weights.record.pruned.items()
            _check_hashes(own, {names[n]: item for n, item in pruned if n in names}, where)
        read = targets or (entries if masks_alone else ())
        masks = {name: read_mask(entries[name]).to(own[name].device) for name in read}
        if keeps or replacements:
            # The model changes before it is filled: nothing may be left to go wrong.
            entries = {name: entry_of(read_values(entry)) for name, entry in entries.items()}
        changed = [*(target.module for target in targets.values()), *modules_of(keeps)]
        with all_or_nothing(changed):
            if keeps:
                cut_units(keeps)
                own = model.state_dict()
            with torch.no_grad():
                if not masks_alone:
                    with threaded_map(len(entries)) as map_:
                        for _ in map_(_put, own.values(), map(entries.get, own)):
                            pass  # where threads share the work, their errors come out
                elif not masked:
                    for name, mask in masks.items():
                        own[name].masked_fill_(~mask, 0.0)
            for name, target in targets.items():
                attach(target, prune.Identity(), masks[name])
    return hold_masks(model)


def _find_places(
    model: nn.Module, weights: Weights, where: str
) -> tuple[dict[str, str], Operations]:
    """Say which tensor of the model each in the file is, and to which layers what was done."""
    names = match_names(weights.entries, model.state_dict(), model)
    modules = match_modules(names)
    told = weights.record.operations if weights.record else {}
    return names, {own_place(name, modules): done for name, done in told.items()}


def _load_state(path: Checkpoint, device: torch.device | str) -> dict[str, Tensor]:
    with open_weights(path, in_memory=True) as weights:
        refuse_masks_alone(weights, f"load_pruned(): {name_of(path)}")
        return {name: read_values(entry).to(device) for name, entry in weights.entries.items()}


def _put(tensor: Tensor, entry: Entry) -> None:
    """Read an entry into a model's tensor, wherever and of whatever dtype that is."""
    same = tensor.is_contiguous() and tensor.dtype == entry.kind.dtype
    if same and tensor.device.type == "cpu":
        fill(entry, tensor)
    else:
        tensor.copy_(read_values(entry))


def _check_fit(
    own: Mapping[str, Tensor],
    shapes: Mapping[str, tuple[int, ...]],
    entries: Mapping[str, Entry],
    masks_alone: bool,
    caller: str,
) -> None:
    """Raise unless a file's tensors have the names and shapes that the model's will have."""
    wrong = [name for name in entries if name not in own]
    wrong += [] if masks_alone else [name for name in own if name not in entries]
    wrong += [name for name, e in entries.items() if shapes.get(name, e.kind.shape) != e.kind.shape]
    if wrong:
        raise ValueError(
            f"{caller}: the file and the model must have the same tensors, found "
            f"{name_some(wrong)} in one of them only or of another shape: build the "
            "model that the file was written from."
        )
    hollow = next((name for name in entries if own[name].is_meta), None)
    if hollow is not None:
        raise ValueError(
            f"{caller}: {hollow} of the model is on the meta device, where nothing can be "
            "loaded: call model.to_empty(device=...) first."
        )


def layers_to_mask(model: nn.Module, labels: Iterable[str], caller: str) -> dict[str, Layer]:
    """Return dense layers that are to get a mask, checked, by the first of their names."""
    targets: dict[tuple[nn.Module, str], Layer] = {}
    for label in labels:
        place, _, name = label.rpartition(".")
        layer = Layer(label, model.get_submodule(place), name)
        check_layer(layer, caller)
        refuse_taken_names(layer, caller)
        targets.setdefault((layer.module, name), layer)
    return {layer.label: layer for layer in targets.values()}


def _check_hashes(own: Mapping[str, Tensor], pruned: Mapping[str, Pruned], where: str) -> None:
    """Raise unless a file's masks belong to these very weights."""

    def matches(name: str) -> bool:
        digest = hashlib.sha256()
        for values, _ in entry_of(own[name]).blocks():
            digest.update(bits_of(values).view(np.uint8).data)
        return digest.hexdigest() == pruned[name].sha256

    with threaded_map(len(pruned)) as map_:
        wrong = [name for name, right in zip(pruned, map_(matches, pruned)) if not right]
    if wrong:
        raise ValueError(
            f"{where} must hold masks of the model's weights, found that those of "
            f"{name_some(wrong)} were made for others: load the weights first that "
            "were behind the masks when they were saved."
        )

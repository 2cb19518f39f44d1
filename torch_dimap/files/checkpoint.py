"""Pruned models on disk: masks as bits and only the values that they keep."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from typing import overload

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from torch_dimap.accounting import check_thresholds
from torch_dimap.files.entries import (
    Entry,
    entry_of,
    fill,
    masked,
    read_mask,
    read_values,
)
from torch_dimap.files.headers import NAMES
from torch_dimap.files.packing import bits_of
from torch_dimap.files.records import Pruned
from torch_dimap.files.replacing import check_target
from torch_dimap.files.stored import holds_masks_alone, open_weights, refuse_masks_alone
from torch_dimap.files.writing import write_weights
from torch_dimap.masking import (
    Layer,
    all_or_nothing,
    attach,
    builtin_rule,
    check_layer,
    hold_masks,
    pruned_tensors,
    refuse_taken_names,
)
from torch_dimap.selection import threaded_map
from torch_dimap.text import name_some

_Path = str | os.PathLike[str]


def save_pruned(
    model: nn.Module,
    path: _Path,
    *,
    masks_only: bool = False,
    hash_weights: bool = False,
    thresholds: Mapping[str, float] | None = None,
    force: bool = False,
) -> None:
    """Save a pruned model, each pruned tensor as a mask of bits and the values it keeps.

    The file is safetensors, its layout is told in ``docs/format.md``. What is kept of
    ``weight_orig * weight_mask`` comes back bit for bit; what is not comes back as +0.0,
    where the product may be -0.0. The values behind the zeros are not saved: to go on
    with them, save ``model.state_dict()``. Tensors that share their memory are saved
    under each of their names. On failure the file is as it was before.

    Args:
        model: with masks, so save before :func:`torch_dimap.remove_all`. On any device.
        path: where to. A symbolic link is followed, and what it points to is replaced.
        masks_only: save the masks alone, one bit per weight, with hashes of the weights
            behind them: the only ones that :func:`load_pruned` will then apply them to.
            Those are the weights as they are now; for masks of a published checkpoint,
            save them before training.
        hash_weights: note these hashes (SHA-256) in a file with values too.
        thresholds: group -> threshold, as the pruning call returned them, to be noted. The
            groups are those that the layers' names speak of, as in ``group_parameters``.
        force: replace a file that exists.

    Raises:
        TypeError: if ``model`` is no module, or ``thresholds`` no mapping.
        ValueError: if nothing in it is pruned, if a pruned weight is tied to one that is
            not or is sharded, if its state dict holds what is no plain tensor, or for
            thresholds of other groups or that are no finite numbers.
        RuntimeError: if an earlier pruning of a tensor is incomplete.
        OSError: if the file exists without ``force``, or the disk refuses.

    Example:
        >>> import tempfile
        >>> from torch.nn.utils import prune
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
    entries = _entries_of(model, caller)
    modules = dict(model.named_modules(remove_duplicate=False))
    group_of = {}
    for name in (name for name, entry in entries.items() if entry.masked):
        place, _, parameter = name.rpartition(".")
        group = builtin_rule(place, modules[place], parameter)
        if group is not None:
            group_of[name] = group
    check_thresholds(thresholds, list(dict.fromkeys(group_of.values())), caller)
    target = check_target(path, caller, force)
    with threaded_map(len(entries)) as map_:
        write_weights(
            target,
            entries,
            "masks" if masks_only else "compressed",
            map_=map_,
            group_of=group_of,
            thresholds={group: float(value) for group, value in (thresholds or {}).items()},
            hashed=masks_only or hash_weights,
        )


@overload
def load_pruned(
    model_or_path: _Path, *, device: torch.device | str = "cpu"
) -> dict[str, Tensor]: ...


@overload
def load_pruned(model_or_path: nn.Module, path: _Path, *, masked: bool = False) -> nn.Module: ...


def load_pruned(model_or_path, path=None, *, masked=False, device="cpu"):
    """Load what :func:`save_pruned` or :func:`torch_dimap.prune_checkpoint` wrote.

    ``load_pruned(path)`` gives a plain state dict; ``load_pruned(model, path)`` fills a
    dense model, and with ``masked=True`` its masks too, ready to be fine-tuned. On
    failure the model is as it was.

    Args:
        model_or_path: a dense model with the names and shapes of the one that was
            saved, on any device; its tensors are filled in place and, as by torch's
            ``load_state_dict``, keep their dtypes. Or the path.
        path: of the file. Any other checkpoint with these weights will do as well. With
            masks alone, they are put on the weights that the model has.
        masked: keep the masks, as torch does: ``<name>_orig``, ``<name>_mask``, and a hook
            that holds the zeros. Otherwise the zeros are ordinary weights.
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
        if path is not None or masked:
            raise TypeError(
                f"{caller}: expected a path alone, or a model, its path and masked=, found "
                f"{type(model_or_path).__name__} in the model's place."
            )
        return _load_state(model_or_path, device)
    if path is None:
        raise TypeError(f"{caller}: expected a path besides the model, found none.")
    model = model_or_path
    pruned = next(pruned_tensors(model, caller), None)
    if pruned is not None:
        raise RuntimeError(
            f"{caller}: the model must be dense, found {pruned.label} pruned already: build it "
            "again, or call remove_all."
        )
    own = model.state_dict()
    with open_weights(path, in_memory=True) as weights:  # from here on nothing can be missing
        entries, masks_alone = weights.entries, holds_masks_alone(weights)
        _check_fit(own, entries, masks_alone, caller)
        targets = _targets(model, entries, caller) if masked else {}
        if masked and not targets:
            raise ValueError(
                f"{caller}: {os.fspath(path)} must have masks for masked=True, found whole tensors "
                "only: leave it out, and prune the model again if it is to keep its zeros."
            )
        if weights.record and masks_alone:
            _check_hashes(own, weights.record.pruned, f"{caller}: {os.fspath(path)}")
        wanted = targets or (entries if masks_alone else ())
        masks = {name: read_mask(entries[name]).to(own[name].device) for name in wanted}
        with torch.no_grad():
            if not masks_alone:
                with threaded_map(len(entries)) as map_:
                    for _ in map_(_put, own.values(), map(entries.get, own)):
                        pass  # where the work is shared among threads, their errors come out
            elif not masked:
                for name, mask in masks.items():
                    own[name].masked_fill_(~mask, 0.0)
    with all_or_nothing(target.module for target in targets.values()):
        for name, target in targets.items():
            attach(target, prune.Identity(), masks[name])
    return hold_masks(model)


def _load_state(path: _Path, device: torch.device | str) -> dict[str, Tensor]:
    with open_weights(path, in_memory=True) as weights:
        refuse_masks_alone(weights, f"load_pruned(): {os.fspath(path)}")
        return {name: read_values(entry).to(device) for name, entry in weights.entries.items()}


def _put(tensor: Tensor, entry: Entry) -> None:
    """Read an entry into a model's tensor, wherever and of whatever dtype that is."""
    same = tensor.is_contiguous() and tensor.dtype == entry.kind.dtype
    if same and tensor.device.type == "cpu":
        fill(entry, tensor)
    else:
        tensor.copy_(read_values(entry))


def _entries_of(model: nn.Module, caller: str) -> dict[str, Entry]:
    """Return a model's state dict as entries, originals and masks joined."""
    pruned = {tensor.label: tensor for tensor in pruned_tensors(model, caller)}
    if not pruned:
        raise ValueError(
            f"{caller}: the model must have masks, found no pruned tensor in it: save before "
            "remove_all, or use prune_checkpoint on the file of a dense model."
        )
    entries: dict[str, Entry] = {}
    for key, value in model.state_dict().items():
        label = key.removesuffix("_orig")
        if key.removesuffix("_mask") in pruned:
            continue
        if not isinstance(value, Tensor) or value.is_meta or value.dtype not in NAMES:
            kind = f"{value.dtype} on {value.device}" if isinstance(value, Tensor) else type(value)
            raise ValueError(
                f"{caller}: the model's state must be plain tensors with values, found {key}, "
                f"{kind}."
            )
        entries[label if label in pruned else key] = entry_of(value)
    for label, (_, module, name) in pruned.items():
        mask = module.get_buffer(f"{name}_mask")
        if mask.dtype != torch.bool and not bool(torch.all((mask == 0) | (mask == 1))):
            raise ValueError(f"{caller}: the mask of {label} must hold 0 and 1 only: binarize it.")
        entries[label] = masked(entries[label], entry_of(mask))
    behind = {entry.memory: name for name, entry in entries.items() if entry.masked}
    for name, entry in entries.items():
        if not entry.masked and entry.memory in behind:
            raise ValueError(
                f"{caller}: {name} must not share its values with the pruned "
                f"{behind[entry.memory]}, which it does: untie it, give one a copy as nn.Parameter."
            )
    return entries


def _check_fit(
    own: Mapping[str, Tensor], entries: Mapping[str, Entry], masks_alone: bool, caller: str
) -> None:
    """Raise unless a file's tensors have the names and shapes of the model's."""
    wrong = [name for name in entries if name not in own]
    wrong += [] if masks_alone else [name for name in own if name not in entries]
    wrong += [n for n, e in entries.items() if n in own and tuple(own[n].shape) != e.kind.shape]
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


def _targets(model: nn.Module, entries: Mapping[str, Entry], caller: str) -> dict[str, Layer]:
    """Return the layers that are to get a mask, by their first name."""
    targets: dict[tuple[nn.Module, str], Layer] = {}
    for label in (label for label, entry in entries.items() if entry.masked):
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

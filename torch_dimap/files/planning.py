"""What a file will do to a model, found out before anything is done."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from typing import NamedTuple

from torch import Tensor, nn

from torch_dimap.files.names import match_modules, match_names, own_place
from torch_dimap.files.operations import plan_cuts, plan_replacements, shapes_after
from torch_dimap.masking import Layer, all_or_nothing, check_layer, refuse_taken_names
from torch_dimap.operations import put
from torch_dimap.storage import (
    Entry,
    Operations,
    Pruned,
    Weights,
    holds_masks_alone,
    refuse_quantised,
)
from torch_dimap.text import name_some
from torch_dimap.units import UnitLayer, UnitRule


class Plan(NamedTuple):
    """What a file does to a model, by the model's names."""

    own: Mapping[str, Tensor]
    entries: Mapping[str, Entry]
    targets: Mapping[str, Layer]  # that get a mask
    hashes: Mapping[str, Pruned]  # of the weights that masks alone are for
    keeps: Mapping[UnitLayer, Tensor]
    replaces: bool  # attentions
    masks_alone: bool


def plan_load(
    model: nn.Module, weights: Weights, masked: bool, unit_rule: UnitRule | None, where: str,
    changes: ExitStack,
) -> Plan:  # fmt: skip
    """Find out what is to be done; after this nothing can be missing.

    Args:
        model: dense.
        weights: the file's content.
        masked: whether the masks are to be kept.
        unit_rule: as for ``load_pruned``.
        where: the call and the file, for messages.
        changes: undo on failure what is done here already: attentions replaced.
    """
    caller = where.partition(": ")[0]
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
    pruned = weights.record.pruned if weights.record and masks_alone else {}
    hashes = {names[name]: item for name, item in pruned.items() if name in names}
    return Plan(own, entries, targets, hashes, keeps, bool(replacements), masks_alone)


def _find_places(
    model: nn.Module, weights: Weights, where: str
) -> tuple[dict[str, str], Operations]:
    """Say which tensor of the model each in the file is, and to which layers what was done."""
    names = match_names(weights.entries, model.state_dict(), model)
    modules = match_modules(names)
    told = weights.record.operations if weights.record else {}
    return names, {own_place(name, modules): done for name, done in told.items()}


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

"""Checkpoints pruned and expanded as streams: no model, and never a whole file in memory."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from torch_dimap.files.skeletons import group_names
from torch_dimap.masking import Rule, amounts_by_group, count_to_prune, warn_of_few
from torch_dimap.selection import (
    Cut,
    FlatWeight,
    Map,
    check_rankable,
    find_cuts_sparingly,
    read_weight,
    threaded_map,
    thrifty,
)
from torch_dimap.storage import (
    Entry,
    Record,
    Weights,
    check_target,
    copied_folder,
    open_weights,
    refuse_masks_alone,
    refuse_quantised,
    write_weights,
)
from torch_dimap.text import warn_of_empty

_Path = str | os.PathLike[str]


def prune_checkpoint(
    source: _Path,
    target: _Path,
    amount: float | Mapping[str, float],
    *,
    compressed: bool = False,
    rule: Rule | None = None,
    force: bool = False,
    progress: bool = False,
) -> dict[str, float]:
    """Prune the weights in a file, without the model that they belong to.

    The masks are those that :func:`torch_dimap.global_module_aware_unstructured` would
    choose for the model: layers are grouped by their names in the file. Values are read
    and written in blocks, a few times each; in memory there is a block per thread and the
    few entries around each cut. Everything else in the file stays as it is, but what is
    no tensor of the state dict, such as an optimizer's state, is left out.

    The target is one safetensors file, whatever the source is. Until it is whole, what
    was there before stays; see :func:`torch_dimap.save_pruned` for its layout.

    Args:
        source: a ``.safetensors`` file, an index of shards
            (``*.safetensors.index.json``), or what ``torch.save`` wrote (a state dict, or
            a dict that holds one); masks of earlier pruning in it are respected. Or a
            folder of the Hugging Face hub with one of these.
        target: the file to write, another than the source. A symbolic link is followed,
            and what it points to is replaced. Of a folder it is a new folder, into which all
            but the weights is copied.
        amount: float, the fraction of every group; int, the total over all groups;
            dict, group -> float or int. Of the weights still unpruned.
        compressed: write masks as bits and only the values that they keep, for
            :func:`torch_dimap.load_pruned`; else whole tensors, +0.0 where they are pruned,
            which any reader of safetensors loads.
        rule: takes the place of the built-in one, as in
            :func:`torch_dimap.group_parameters`; it sees modules without values.
        force: replace a file that exists.
        progress: show a bar on the standard error.

    Returns:
        Group -> threshold, the highest score that went; 0.0 if nothing did.

    Raises:
        TypeError: for an amount of another type.
        ValueError: for an amount out of range, a source that is no checkpoint, is damaged or
            quantised, has no layers that can be grouped, or holds NaN or infinity among
            those; if the target is the source; for a ``compressed`` folder.
        OSError: if the target exists without ``force``, or the disk refuses.

    Source: He and Zhou, ICLR 2024, Sec. 4.1.

    Example:
        >>> import tempfile, timm, torch
        >>> folder = tempfile.mkdtemp()
        >>> dense, half = f"{folder}/dense.pth", f"{folder}/half.safetensors"
        >>> model = timm.create_model("swin_tiny_patch4_window7_224", embed_dim=24)
        >>> torch.save(model.state_dict(), dense)
        >>> thresholds = prune_checkpoint(dense, half, 0.5, compressed=True)
        >>> list(thresholds), os.path.getsize(half) < 0.7 * os.path.getsize(dense)
        (['qkv', 'proj', 'mlp'], True)
    """
    caller = "prune_checkpoint()"
    if compressed and os.path.isdir(source):
        raise ValueError(
            f"{caller}: a folder must get whole tensors, which from_pretrained reads: leave out "
            "compressed, or name the file in it to compress."
        )
    with open_weights(source) as weights, _target(source, target, caller, force, weights) as path:
        entries = weights.entries
        refuse_masks_alone(weights, f"{caller}: {os.fspath(source)}")
        refuse_quantised(entries, f"{caller}: {os.fspath(source)}")
        groups = group_names(entries, rule)
        names = [name for members in groups.values() for name in members]
        work = sum(entries[name].kind.bytes for name in [*names, *entries])
        with _bar(work, progress) as done, threaded_map(len(entries)) as map_:

            def look(name: str) -> FlatWeight:
                weight = _look(entries[name], f"{caller}: {name} in {os.fspath(source)}")
                done(entries[name].kind.bytes)
                return weight

            map_ = thrifty(map_)
            flat = dict(zip(names, map_(look, names)))
            cuts, thresholds = _find_cuts(flat, groups, amount, f"{caller}: amount", map_)
            warn_of_empty([n for n in names if entries[n].kind.size and not cuts[n].kept], caller)
            write_weights(
                path,
                entries,
                "compressed" if compressed else "dense",
                map_=map_,
                cuts=cuts,
                group_of={name: group for group, members in groups.items() for name in members},
                thresholds=thresholds,
                operations=weights.record.operations if weights.record else None,
                metadata=weights.metadata,
                done=done,
            )
    return thresholds


def expand_checkpoint(
    source: _Path, target: _Path, *, force: bool = False, progress: bool = False
) -> None:
    """Write a file with masks as one with whole tensors, +0.0 where they are pruned.

    Args:
        source: what :func:`torch_dimap.save_pruned` or :func:`prune_checkpoint` wrote
            compressed, or the state dict of a model with torch's masks; also in a folder,
            to make one of a masked model that ``from_pretrained`` reads.
        target: the safetensors file or folder to write, as for :func:`prune_checkpoint`.
        force: replace a file that exists.
        progress: show a bar on the standard error.

    Raises:
        ValueError: if the source is no checkpoint, is damaged, or has no masks or nothing
            else than masks; if the target is the source.
        OSError: if the target exists without ``force``, or the disk refuses.
    """
    caller = "expand_checkpoint()"
    with open_weights(source) as weights, _target(source, target, caller, force, weights) as path:
        refuse_masks_alone(weights, f"{caller}: {os.fspath(source)}")
        if not any(entry.masked for entry in weights.entries.values()):
            raise ValueError(
                f"{caller}: {os.fspath(source)} must have masks to be expanded, found whole "
                "tensors only: it can be used as it is."
            )
        record = weights.record or Record("dense", "", {}, {}, {})
        group_of = {name: p.group for name, p in record.pruned.items() if p.group is not None}
        thresholds = {group: asked.threshold for group, asked in record.groups.items()}
        work = sum(entry.kind.bytes for entry in weights.entries.values())
        with _bar(work, progress) as done, threaded_map(len(weights.entries)) as map_:
            write_weights(
                path,
                weights.entries,
                "dense",
                map_=thrifty(map_),
                group_of=group_of,
                thresholds=thresholds,
                operations=record.operations,
                metadata=weights.metadata,
                done=done,
            )


@contextmanager
def _target(
    source: _Path, target: _Path, caller: str, force: bool, weights: Weights
) -> Iterator[Path]:
    """Yield the file to write: the target, or in a copy of the source's folder."""
    if os.path.isdir(source):
        with copied_folder(Path(source), Path(target), caller) as path:
            yield path
    else:
        yield check_target(target, caller, force, weights.files)


def _look(entry: Entry, what: str) -> FlatWeight:
    """Read a weight for the first time, and refuse what has no rank."""
    check_rankable(torch.empty(0, dtype=entry.kind.dtype), what)
    return read_weight(entry.blocks, what)


def _find_cuts(
    weights: Mapping[str, FlatWeight],
    groups: Mapping[str, list[str]],
    amount: float | Mapping[str, float],
    what: str,
    map_: Map,
) -> tuple[dict[str, Cut], dict[str, float]]:
    """Return the cut of each weight, and the threshold of each group."""
    unpruned = {
        group: sum(weights[name].chooseable for name in names) for group, names in groups.items()
    }
    amounts = amounts_by_group(amount, unpruned, what)
    warn_of_few(amount, sum(unpruned.values()), what)
    cuts: dict[str, Cut] = {}
    thresholds = {}
    for group, names in groups.items():
        count = count_to_prune(amounts[group], unpruned[group], what)
        members = [weights[name] for name in names]
        found, thresholds[group] = find_cuts_sparingly(members, count, map_)
        cuts.update(zip(names, found))
    return cuts, thresholds


@contextmanager
def _bar(total: int, shown: bool) -> Iterator[Callable[[int], Any]]:
    """Yield what moves a progress bar on by so many bytes."""
    with tqdm(total=total, unit="B", unit_scale=True, disable=not shown) as bar:
        yield bar.update

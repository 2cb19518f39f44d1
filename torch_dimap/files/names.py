"""Which tensor of a model a checkpoint's tensor is, whatever was put around either of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from torch_dimap.masking import unwrapped_name
from torch_dimap.text import name_some

_DEPTH = 4  # as many names may a wrapper put before another's


def match_names(found: Iterable[str], own: Iterable[str], model: nn.Module) -> dict[str, str]:
    """Find for the names in a checkpoint those of the same tensors in a model.

    One of them may have a prefix, such as ``"model."`` for what is in a LightningModule and
    ``"module."`` for DistributedDataParallel; inside, torch.compile and adapters may have put
    a name of theirs; and transformers gives names in memory that its files do not have. What
    fits most names is taken, a name as it is first.

    Args:
        found: names in the checkpoint, of whole tensors: not ``weight_orig``.
        own: names in the model, likewise.
        model: the model.

    Returns:
        Name in the checkpoint -> name in the model, also where there is none of that name.
        What lies outside of a prefix, such as a loss beside the model, is left out.

    Raises:
        ValueError: if two prefixes fit equally well.
    """
    own_names = {unwrapped_name(name): name for name in own}
    plain = {name: unwrapped_name(name) for name in found}
    fitting = _count(plain, own_names)
    if fitting < len(plain):
        renamed = _names_in_transformers(plain, model)
        plain = renamed if renamed and _count(renamed, own_names) >= fitting else plain
        plain = _through_prefix(plain, own_names)
    return {name: own_names.get(key, key) for name, key in plain.items()}


def match_modules(names: Mapping[str, str]) -> dict[str, str]:
    """Derive from the names of tensors those of the modules around them."""
    modules: dict[str, str] = {}
    for found, own in names.items():
        while found and own and found.rpartition(".")[2] == own.rpartition(".")[2]:
            found, own = found.rpartition(".")[0], own.rpartition(".")[0]
            modules.setdefault(found, own)
    return modules


def own_place(place: str, modules: Mapping[str, str]) -> str:
    """Return a model's name for a module that a checkpoint names, of tensors or without."""
    around, _, last = place.rpartition(".")
    return modules.get(place, f"{modules[around]}.{last}" if around in modules else place)


def _count(found: Mapping[str, str], own: Mapping[str, str]) -> int:
    return sum(name in own for name in found.values())


def _through_prefix(found: dict[str, str], own: Mapping[str, str]) -> dict[str, str]:
    """Take a prefix from the names in which it is found, or put one before them all."""
    ways = {"": found}
    for less in _prefixes(found.values()):
        inside = {name: key for name, key in found.items() if key.startswith(less)}
        ways[f"{less}*"] = {name: key.removeprefix(less) for name, key in inside.items()}
    for more in _prefixes(own):
        ways[more] = {name: more + key for name, key in found.items()}
    counts = {way: _count(names, own) for way, names in ways.items()}
    most = max(counts.values())
    best = [way for way, count in counts.items() if count == most]
    if 2 * most < min(len(found), len(own)):  # a few names are alike by chance
        return found
    if len(best) > 1 and best[0]:
        raise ValueError(
            f"a checkpoint must fit a model in one way, found {len(best)}, through the prefixes "
            f"{name_some(best)}: pass the inner model, or the part of the state dict that is meant."
        )
    return ways[best[0]]


def _prefixes(names: Iterable[str]) -> list[str]:
    """Return the beginnings of names, up to a dot, shortest first."""
    parts = (name.split(".") for name in names)
    found = {
        ".".join(own[:depth]) + "." for own in parts for depth in range(1, min(_DEPTH, len(own)))
    }
    return sorted(found, key=lambda prefix: (prefix.count("."), prefix))


def _names_in_transformers(plain: Mapping[str, str], model: Any) -> dict[str, str]:
    """Rename as transformers does when it loads a file; nothing for other models.

    Versions before 5 keep the names of the file.
    """
    kinds = type(model).__mro__
    if not any(k.__name__ == "PreTrainedModel" and k.__module__.startswith("transformers.")
               for k in kinds):  # fmt: skip
        return {}
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming
    except ImportError:
        return {}
    renamings = [x for x in get_model_conversion_mapping(model) if isinstance(x, WeightRenaming)]
    renamed = dict(plain)
    for renaming in renamings:
        renamed = {name: renaming.rename_source_key(key)[0] for name, key in renamed.items()}
    return renamed

"""Which weights of a vision transformer are ranked together."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from torch_dimap.masking.layers import Pair, computed_by
from torch_dimap.masking.readers import note_readers, survey
from torch_dimap.text import name_some, warn

Rule = Callable[[str, nn.Module, str], "str | None"]

# The paper's three modules (Sec. 3.1, Fig. 3) under the names that models give them: group,
# what holds the layer, the layer. The first row that fits a qualified name decides; what
# none of them fits is auxiliary and stays dense. Reasons: docs/backbones.md.
_ATTENTION = r"(\w*(attn|attention|att_)\w*|token_mixer|mixer\.m|xca|e_mhsa)(\.(self|\d))?"
_MLP = r"mlp(\d|_in|_layer|_tokens|_channels)?|ffn\d?(\.m)?"
NAMES = (
    ("qkv", _ATTENTION, r"qkvs?|to_qkv|qkv_proj|qk|kv"),
    ("qkv", _ATTENTION, r"[qkv]|w[qkv]|[qkv]_proj|(to_|projection_)?(query|key|value)"),
    ("proj", _ATTENTION, r"proj|o_proj|out_proj|output|output\.dense|merge"),
    ("mlp", _MLP, r"fc\d|dense\d|lin\d|ln\d|pw\d|conv\d|\d"),
    ("mlp", _MLP, r"fc\d_[gx]|w\d+|(gate|up|down)_proj|weights_(in|out)"),
    ("mlp", r"intermediate|output", r"dense"),
    ("qkv", r"attn", r"attn"),
)
# A layer may sit in a container that joins it with its norm or puts an activation before it.
_WRAPPED = r"(\.(conv|convolution|linear|ln|proj|c|\d))*"
_RULES = [
    (group, re.compile(rf"(^|\.)({holder})\.({layer}){_WRAPPED}$"))
    for group, holder, layer in NAMES
]
# Attention and MLPs that belong to no block: pooling heads and relative positions.
_AUXILIARY = re.compile(r"(^|\.)(heads?|attn_pool|\w*rel_pos)\.")
# Modules that others put around a layer or a block, which is still what it was: adapters
# (peft), torch.compile, activation checkpointing, FSDP. Their names are passed over.
_WRAPPERS = re.compile(
    r"(^|\.)(base_layer|_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)(?=\.|$)"
)
GROUPS = ("qkv", "proj", "mlp")
# What surrounds the blocks, and does not count when asked how much of these is known.
_NO_BLOCK = re.compile(r"(^|\.)(heads?|attn_pool|stem|downsample|\w*embed\w*)(\.|$)")
# What detectors and segmenters call the network whose features they use.
_BACKBONE = re.compile(r"^(.*?(^|\.)(backbone|pixel_level_module\.encoder))\.")
_IN_PROJECTIONS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


def group_parameters(model: nn.Module, rule: Rule | None = None) -> dict[str, list[Pair]]:
    """Group a model's prunable weights into the paper's modules.

    Knows the names that the vision transformers of timm, torchvision and Hugging Face
    transformers give to their layers, also inside other models and known wrappers such as
    peft's LoRA: ``docs/coverage.md`` lists the families, ``docs/backbones.md`` says what
    goes where and why. Takes weights of ``nn.Linear``, 1x1 ``nn.Conv2d`` and
    ``nn.MultiheadAttention``, never biases; of a pruned model the same as of the dense one.
    Warns if it knows less than half of the weights in the model's blocks, and of weights
    that it would know but for a wrapper or a parametrization. Of a detector or segmenter
    it takes whatever is named so, and warns if that is more than the backbone:
    ``group_parameters(model.backbone)`` takes that alone.

    Args:
        model: the model; it is only read.
        rule: replaces :func:`builtin_rule`. Called as ``rule(qualified_name, module, name)``
            for every parameter of every module, with the module's name in the model
            (``"layers.0.blocks.0.attn.qkv"``), the module, and the parameter's name in it
            (``"weight"``, also where it is pruned). It returns a group's name, or None
            for a parameter that stays dense.

    Returns:
        Group name -> ``(module, name)`` pairs in the order of definition. The built-in
        rule gives ``"qkv"``, ``"proj"`` and ``"mlp"``; groups without any layer are
        left out.

    Raises:
        TypeError: for a ``model`` or an answer of the rule of another type.
        ValueError: if nothing is put into any group, or a grouped weight is tied to another.

    Source: He and Zhou, ICLR 2024, Sec. 3.1, Fig. 3 and App. B.

    Example:
        >>> import timm
        >>> swin = timm.create_model("swin_tiny_patch4_window7_224")
        >>> {group: len(pairs) for group, pairs in group_parameters(swin).items()}
        {'qkv': 12, 'proj': 12, 'mlp': 24}

        Every layer for itself, which is uniform layer-wise magnitude pruning:

        >>> uniform = {
        ...     f"{group}.{i}": [pair]
        ...     for group, pairs in group_parameters(swin).items()
        ...     for i, pair in enumerate(pairs)
        ... }
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"group_parameters(): model must be an nn.Module, found {type(model).__name__}."
        )
    groups: dict[str, list[Pair]] = {} if rule else {group: [] for group in GROUPS}
    places: dict[Tensor, tuple[str, str | None]] = {}
    hidden: dict[str, str] = {}
    for module, (qualified_name, readers) in survey(model).items():
        hidden |= {} if rule else _hidden_weights(qualified_name, module)
        for name, tensor in _unpruned_parameters(module):
            group = (rule or builtin_rule)(qualified_name, module, name)
            place = f"{qualified_name}.{name}".removeprefix(".")
            _check_group(group, place, places.setdefault(tensor, (place, group)))
            if group is not None:
                groups.setdefault(group, []).append((module, name))
                note_readers(module, readers)
    _warn_of_hidden(hidden, places)
    _check_coverage(model, rule, places if rule else _backbone_of(places))
    return {group: pairs for group, pairs in groups.items() if pairs}


def builtin_rule(qualified_name: str, module: nn.Module, name: str) -> str | None:
    """Tell the group of one parameter by its name and type: see :data:`NAMES`.

    Made to be called in a rule of one's own, which then only says what is different.

    Example:
        >>> def only_mlps(qualified_name, module, name):
        ...     group = builtin_rule(qualified_name, module, name)
        ...     return group if group == "mlp" else None
    """
    layer = unwrapped_name(qualified_name)
    if isinstance(module, nn.MultiheadAttention) and name in _IN_PROJECTIONS:
        layer += ".attn.qkv"
    elif isinstance(module, NonDynamicallyQuantizableLinear) and name == "weight":
        layer += ".attn.proj"  # torch has this type for the out_proj of MultiheadAttention only
    elif name != "weight" or not _is_linear(module):
        return None
    if _AUXILIARY.search(layer):
        return None
    return next((group for group, pattern in _RULES if pattern.search(layer)), None)


def unwrapped_name(qualified_name: str) -> str:
    """Return a name without the modules that known wrappers put around others."""
    return _WRAPPERS.sub("", qualified_name).removeprefix(".")


def _hidden_weights(qualified_name: str, module: nn.Module) -> dict[str, str]:
    """Return weights that something keeps out of a group -> the layer that it keeps them from."""
    found = {
        f"{qualified_name}.{name}": qualified_name
        for name in (_IN_PROJECTIONS if isinstance(module, nn.MultiheadAttention) else ("weight",))
        if computed_by(module, name) and builtin_rule(qualified_name, module, name)
    }
    around = qualified_name.rpartition(".")[0]
    if _is_linear(module) and not builtin_rule(qualified_name, module, "weight"):
        if builtin_rule(around, module, "weight"):
            found[f"{qualified_name}.weight"] = around
    return found


def _warn_of_hidden(hidden: dict[str, str], places: dict[Tensor, tuple[str, str | None]]) -> None:
    """Warn of weights in wrappers, but for those that stand beside a layer's own, as LoRA's do."""
    grouped = [place.rpartition(".")[0] for place, group in places.values() if group]
    inside = {layer.rpartition(".")[0] for layer in grouped}
    names = [name for name, layer in hidden.items() if layer not in inside]
    if names:
        warn(
            f"group_parameters(): {name_some(names)} would be in a group by name, but for a "
            "wrapper or a parametrization around the layer, and stay dense: take that off first, "
            "or name the weights with rule=."
        )


def _is_linear(module: nn.Module) -> bool:
    if isinstance(module, nn.Conv2d):
        return module.kernel_size == (1, 1)
    return isinstance(module, nn.Linear)


def _unpruned_parameters(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield a module's own parameters by the names they have while they are not pruned."""
    for name, tensor in module.named_parameters(recurse=False, remove_duplicate=False):
        original = name.removesuffix("_orig")
        yield (original if f"{original}_mask" in module._buffers else name), tensor


def _check_group(group: Any, place: str, first: tuple[str, str | None]) -> None:
    """Refuse what is no group's name, and a weight that was met before in another place."""
    if not isinstance(group, (str, type(None))):
        raise TypeError(
            f"group_parameters(): rule must return a group's name or None, found "
            f"{type(group).__name__} for {place}."
        )
    if place != first[0] and (group or first[1]):
        raise ValueError(
            f"group_parameters(): expected a weight of its own in every place, found one tensor "
            f"tied to {first[0]} and {place}, which torch masks in one place only: untie it "
            "(give one of them a copy as nn.Parameter), or leave both out with rule=."
        )


def _backbone_of(
    places: dict[Tensor, tuple[str, str | None]],
) -> dict[Tensor, tuple[str, str | None]]:
    """Return what lies in a detector's backbone, if it has one, and warn of groups beyond it."""
    grouped = [place for place, group in places.values() if group]
    backbones = {match[1] for place in grouped if (match := _BACKBONE.search(place))}
    if len(backbones) != 1:
        return places
    (backbone,) = backbones
    beyond = [place for place in grouped if not place.startswith(f"{backbone}.")]
    if beyond:
        warn(
            f"group_parameters(): {name_some(beyond)} lie outside of {backbone} and would be "
            "ranked together with it: for the backbone alone call "
            f"group_parameters(model.{backbone}), or name the groups with rule=."
        )
        return places
    return {tensor: x for tensor, x in places.items() if x[0].startswith(f"{backbone}.")}


def _check_coverage(
    model: nn.Module, rule: Rule | None, places: dict[Tensor, tuple[str, str | None]]
) -> None:
    """Raise if nothing was grouped; warn if the rule missed most of what the blocks hold."""
    kind = type(model).__name__
    found = sum(tensor.numel() for tensor, (_, group) in places.items() if group)
    if rule and not found:
        raise ValueError(
            f"group_parameters(): rule put no parameter of {kind} into a group: it is called as "
            "rule(qualified_name, module, name) and returns a group's name."
        )
    if rule:
        return
    missed = _repeated({tensor: place for tensor, (place, group) in places.items() if not group})
    largest = ", ".join(name for name, _ in missed.most_common(3))
    if not found:
        _refuse_quantised(model)
        raise ValueError(
            f"group_parameters(): no layer of {kind} is named like the query/key/value, attention "
            "projection or MLP layers of a vision transformer"
            + (f"; its blocks hold {largest}" if largest else "")
            + ": pass rule= to say which parameters belong together."
        )
    share = found / (found + missed.total())
    if share < 0.5:
        warn(
            f"group_parameters(): only {share:.0%} of the weights in the blocks of {kind} are "
            f"recognised; {largest} and the like stay dense: pass rule= to group them too."
        )


def _refuse_quantised(model: nn.Module) -> None:
    """Raise for a model whose layers hold codes, for which there may be no other reason."""
    modules = model.named_modules()
    packed = [name for name, module in modules if "quantized" in type(module).__module__]
    if packed:
        raise ValueError(
            f"group_parameters(): the layers of {type(model).__name__} must hold their weights, "
            f"found quantised ones ({name_some(packed)}), which take no masks: prune the model and "
            "bake it with remove_all before it is quantised."
        )


def _repeated(places: dict[Tensor, str]) -> Counter[str]:
    """Count the weights of every kind of matrix or kernel that a model's blocks repeat."""
    weights: Counter[str] = Counter()
    times: Counter[str] = Counter()
    for tensor, place in places.items():
        if tensor.dim() > 1 and not _NO_BLOCK.search(place):
            kind = re.sub(r"\d+", "*", place)
            weights[kind] += tensor.numel()
            times[kind] += 1
    return Counter({kind: weights[kind] for kind in weights if times[kind] > 1})

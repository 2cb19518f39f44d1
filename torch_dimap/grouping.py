"""Which weights of a vision transformer are ranked together."""

from __future__ import annotations

import re
from collections.abc import Callable

from torch import nn

Pair = tuple[nn.Module, str]

# The paper's three modules (Sec. 3.1, Fig. 3): group -> names of its layers, matched
# against the end of the qualified name. What matches none of them is auxiliary and
# stays dense: patch embedding and merging, norms, position biases, the head.
LAYERS = {
    "qkv": re.compile(r"(^|\.)attn\.qkv$"),
    "proj": re.compile(r"(^|\.)attn\.proj$"),
    "mlp": re.compile(r"(^|\.)mlp\.fc[12]$"),
}


def group_parameters(
    model: nn.Module, rule: Callable[[str, nn.Module, str], str | None] | None = None
) -> dict[str, list[Pair]]:
    """Group a model's prunable weights into the paper's modules.

    Covers the Swin Transformers (v1) of timm, of every size, and models that name
    their layers alike. Weights only, never biases. A pruned model is grouped like
    the dense one.

    Args:
        model: the model; it is only read.
        rule: called as ``rule(qualified_name, module, name)`` for every parameter of
            every module, with the module's name in the model (``"layers.0.blocks.0.attn.qkv"``),
            the module, and the parameter's name in it (``"weight"``, also where it is
            pruned). It returns a group's name, or None for a parameter that stays
            dense, and replaces the built-in rule.

    Returns:
        Group name -> ``(module, name)`` pairs in the order of definition. The built-in
        rule gives ``"qkv"``, ``"proj"`` and ``"mlp"``; groups without any layer are
        left out.

    Raises:
        TypeError: if the rule returns something else than a string or None.
        ValueError: if no parameter is put into any group.

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
    groups: dict[str, list[Pair]] = {} if rule else {group: [] for group in LAYERS}
    for qualified_name, module in model.named_modules():
        for parameter, _ in module.named_parameters(recurse=False):
            name = _unpruned_name(module, parameter)
            group = (rule or _swin_rule)(qualified_name, module, name)
            if group is None:
                continue
            if not isinstance(group, str):
                raise TypeError(
                    f"group_parameters(): rule must return a group's name or None, found "
                    f"{type(group).__name__} for {qualified_name}.{name}."
                )
            groups.setdefault(group, []).append((module, name))
    groups = {group: pairs for group, pairs in groups.items() if pairs}
    if not groups:
        kind = type(model).__name__
        raise ValueError(
            f"group_parameters(): rule put no parameter of {kind} into a group."
            if rule
            else f"group_parameters(): no layer of {kind} is named like the query/key/value, "
            "attention projection or MLP layers of a Swin Transformer: pass rule= to say which "
            "parameters belong together."
        )
    return groups


def _swin_rule(qualified_name: str, module: nn.Module, name: str) -> str | None:
    if name == "weight" and isinstance(module, nn.Linear):
        for group, pattern in LAYERS.items():
            if pattern.search(qualified_name):
                return group
    return None


def _unpruned_name(module: nn.Module, parameter: str) -> str:
    """Undo the renaming that torch's pruning does to a parameter."""
    name = parameter.removesuffix("_orig")
    return name if f"{name}_mask" in module._buffers else parameter

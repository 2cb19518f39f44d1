"""Which units a model has, and where it keeps them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from operator import attrgetter
from typing import Any

from torch import Tensor, nn

from torch_dimap.families import ATTENTIONS, MLPS, REFUSED, SHARED, Row, is_ours
from torch_dimap.masking import Place, builtin_rule, computed_by, note_readers, survey
from torch_dimap.text import name_some, warn
from torch_dimap.units.description import HEADS, NEURONS, Attribute, Part, UnitLayer

UnitRule = Callable[[str, nn.Module], Iterable[UnitLayer]]
# The groups of group_parameters, by what their units are.
KIND_OF = {"qkv": HEADS, "proj": HEADS, "mlp": NEURONS}
KNOWN = {*ATTENTIONS, *MLPS}
# What attentions call the width of a head. The number of heads alone may be that of one process.
HEAD_WIDTHS = ("head_dim", "attention_head_size")


def group_units(model: nn.Module, rule: UnitRule | None = None) -> dict[str, list[UnitLayer]]:
    """Group a model's attention heads and its MLP neurons, layer by layer.

    A unit goes whole: the rows that make it, the columns that read it, and what else is
    kept per unit. Each layer's :class:`UnitLayer` tells where all that is. The width of
    the residual stream belongs to no unit and is never touched. Knows the classes in
    ``families/``; ``docs/backbones.md`` says which these are and why others
    are not among them.

    Args:
        model: the model; it is only read.
        rule: replaces :func:`builtin_unit_rule`. Called as ``rule(qualified_name, module)``
            for every module; returns the unit layers that this very module holds.

    Returns:
        ``"heads"`` and ``"neurons"`` -> unit layers in the order of definition; a rule of
        one's own may give other kinds. Kinds without any layer are left out. Layers whose
        units could not be removed exactly are left out too, with a warning that names
        them and the reason.

    Raises:
        TypeError: for a ``model`` or an answer of the rule of another type.
        ValueError: if nothing is left, or a tensor that holds units is tied to another.

    Example:
        >>> import timm
        >>> swin = timm.create_model("swin_tiny_patch4_window7_224")
        >>> units = group_units(swin)
        >>> [(kind, len(layers), sum(x.units for x in layers)) for kind, layers in units.items()]
        [('heads', 12, 138), ('neurons', 12, 17664)]
    """
    layers = describe_units(model, rule, "group_units()")
    reasons = _reasons(model, rule, layers)
    groups: dict[str, list[UnitLayer]] = {} if rule else {HEADS: [], NEURONS: []}
    for layer in layers:
        if not layer.obstacle:
            groups.setdefault(layer.kind, []).append(layer)
    groups = {kind: found for kind, found in groups.items() if found}
    if not groups:
        raise ValueError(
            f"group_units(): no heads or neurons of {type(model).__name__} can be removed"
            + (f"; {name_some(reasons)}" if reasons else "")
            + ": pass rule= to describe the units of your own classes."
        )
    if reasons:
        warn(
            f"group_units(): some units of {type(model).__name__} stay as they are, since they "
            f"cannot be removed: {name_some(reasons)}."
        )
    return groups


def units_left_out(model: nn.Module, rule: UnitRule | None = None) -> list[str]:
    """Say which heads and neurons :func:`group_units` leaves out, and why.

    Example:
        >>> import timm
        >>> units_left_out(timm.create_model("cait_xxs24_224"))
        ['the heads of TalkingHeadAttn: proj_l and proj_w mix its heads']
    """
    return _reasons(model, rule, describe_units(model, rule, "units_left_out()"))


def _reasons(model: nn.Module, rule: UnitRule | None, layers: list[UnitLayer]) -> list[str]:
    reasons = [f"{x.name} ({x.kind}): {x.obstacle}" for x in layers if x.obstacle]
    return reasons if rule else reasons + _left_out(survey(model), layers)


def describe_units(model: nn.Module, rule: UnitRule | None, caller: str) -> list[UnitLayer]:
    """List a model's unit layers, ready to be masked or cut, and refuse tied tensors."""
    layers, places = list_units(model, rule, caller), survey(model)
    _refuse_ties(places, layers, caller)
    for module in {part.module: None for layer in layers for part in layer.parts}:
        note_readers(module, places[module].readers)
    return layers


def list_units(model: nn.Module, rule: UnitRule | None, caller: str) -> list[UnitLayer]:
    """List a model's unit layers, also those whose units could not be removed exactly."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{caller}: model must be an nn.Module, found {type(model).__name__}.")
    places = survey(model)
    layers: list[UnitLayer] = []
    for module, place in places.items():
        for layer in (rule or builtin_unit_rule)(place.name, module):
            if not isinstance(layer, UnitLayer):
                raise TypeError(
                    f"{caller}: rule must return UnitLayers, found {type(layer).__name__} "
                    f"for {place.name}."
                )
            layers.append(layer)
    return list(_with_shared(layers, places))


def builtin_unit_rule(qualified_name: str, module: nn.Module) -> Iterator[UnitLayer]:
    """Describe the units of one module by its class: see ``families/``.

    Made to be called in a rule of one's own, which then only says what is different.

    Example:
        >>> def only_neurons(qualified_name, module):
        ...     layers = builtin_unit_rule(qualified_name, module)
        ...     return [layer for layer in layers if layer.kind == "neurons"]
    """
    owner = forward_class(module)
    for kind, row in ((HEADS, ATTENTIONS.get(owner)), (NEURONS, MLPS.get(owner))):
        if row is None:
            continue
        if not isinstance(row, Row):  # it depends on the module's options
            row = row(module)
        reader = attrgetter(row.reader)(module)
        # What stays dense in unstructured pruning (pooling heads, MLPs that make a position
        # bias) stays whole.
        stays_dense = not builtin_rule(f"{qualified_name}.{row.reader}", reader, "weight")
        if not stays_dense and not _is_foreign(reader):
            layer = _describe(qualified_name, kind, module, row)
            if layer.units:
                yield layer


def forward_class(module: nn.Module) -> str:
    """Return the full name of the class, in the model's library, whose forward a module runs."""
    if "forward" in vars(module):
        return ""  # patched: nobody knows what it does
    kinds = [kind for kind in type(module).__mro__ if not is_ours(kind)]
    names = [f"{kind.__module__}.{kind.__qualname__}" for kind in kinds]
    owner = next(i for i, kind in enumerate(kinds) if "forward" in vars(kind))
    # A class that leaves its parent's forward alone, as an MLP that is a Sequential does,
    # may have a row of its own.
    return next((name for name in names[:owner] if name in KNOWN), names[owner])


def _describe(name: str, kind: str, module: nn.Module, row: Row) -> UnitLayer:
    """Read a row of the table on one module."""
    reader = attrgetter(row.reader)(module)
    read = Part(reader, "weight", 1, row.columns, 1)
    columns = read.tensor.shape[1]
    units = attrgetter(row.number)(module) if row.number else columns
    parts: list[Part] = []
    obstacles = []
    held = [(path, 0, blocks, True) for path, blocks in row.makes.items()]
    held += [(path, dim, 1, False) for path, dim in row.along.items()]
    for path in row.mixed:
        between = _find(module, path)
        if isinstance(between, nn.modules.batchnorm._BatchNorm):
            held.append((path, 0, 1, False))
        elif between is not None and not isinstance(between, nn.Identity):
            obstacles.append(f"{path} mixes them")
    for path, dim, blocks, masked in held:
        if _is_foreign(_find(module, path)):
            obstacles.append(f"{path} is wrapped, or its weight is computed")
            continue
        for part in _tensors(module, path):
            entries, rest = divmod(part.tensor.shape[dim], blocks * max(1, units))
            if rest:
                obstacles.append(f"{path} does not hold {blocks} x {units} of them")
            parts.append(Part(part.module, part.name, dim, blocks, entries, masked))
    parts.append(read._replace(entries=columns // (row.columns * max(1, units))))
    widths = [getattr(module, name, None) for name in HEAD_WIDTHS if kind == HEADS]
    for width in (x for x in widths if isinstance(x, int) and x * units != columns):
        obstacles.append(f"its heads are {width} wide, and {columns} columns do not hold {units}")
    attributes = []
    for path, per_unit, place in row.numbers(columns // max(1, units)):
        holder, _, attribute = path.rpartition(".")
        found = Attribute(_find(module, holder) if holder else module, attribute, per_unit, place)
        attributes.append(found)
        if found.number != per_unit * units:
            obstacles.append(f"{path} is {found.number}, not {per_unit} x {units}")
    # The forwards of emptied layers are for channels that come last, and torch's convolution
    # of no channels returns none.
    channels, empty = (1, None) if isinstance(reader, nn.Conv2d) else (-1, row.empty)
    return UnitLayer(
        name, kind, units, module, tuple(parts), tuple(attributes), reader,
        channels, row.forward, empty, "; ".join(obstacles),
    )  # fmt: skip


def _find(module: nn.Module, path: str) -> Any:
    """Return what is under a path, None if a part of the way is missing."""
    found: Any = module
    for name in path.split("."):
        found = getattr(found, name, None)
    return found


def _is_foreign(layer: Any) -> bool:
    """Tell a layer whose weight is held or made by something else: LoRA, a parametrization."""
    if not isinstance(layer, nn.Module) or getattr(layer, "weight", None) is None:
        return False
    return "weight" not in _tensor_names(layer) or computed_by(layer, "weight") is not None


def _tensors(module: nn.Module, path: str) -> Iterator[Part]:
    """Yield the tensors that a path stands for, those of a layer or the one that it names."""
    holder, _, name = path.rpartition(".")
    owner = _find(module, holder) if holder else module
    if not isinstance(owner, nn.Module):
        return
    layer = owner._modules.get(name)
    names = _tensor_names(owner if layer is None else layer)
    for found in names if layer is not None else {name} & names.keys():
        yield Part(owner if layer is None else layer, found, 0, 1, 1)


def _tensor_names(module: nn.Module) -> dict[str, None]:
    """Return the names that a module's own tensors have while they are not pruned."""
    buffers = {k: v for k, v in module._buffers.items() if not k.endswith("_mask")}
    tensors = {**module._parameters, **buffers}
    return {k.removesuffix("_orig"): None for k, v in tensors.items() if v is not None and v.dim()}


def _with_shared(
    layers: list[UnitLayer], places: dict[nn.Module, Place]
) -> Iterator[UnitLayer]:
    """Note where blocks share something that is kept per head."""
    attributes = [(module, SHARED.get(forward_class(module), "")) for module in places]
    shared = [name for module, name in attributes if name and getattr(module, name, None)]
    for layer in layers:
        if shared and layer.kind == HEADS:
            obstacle = f"its blocks share {shared[0]}, which is kept per head"
            layer = layer._replace(obstacle="; ".join(filter(None, (layer.obstacle, obstacle))))
        yield layer


def _refuse_ties(modules: Iterable[nn.Module], layers: list[UnitLayer], caller: str) -> None:
    """Refuse a tensor that holds units and has a second place, or two layers' units."""
    places: Counter[Tensor] = Counter()
    for module in modules:
        places.update(tensor for tensor in module._parameters.values() if tensor is not None)
    held: set[tuple[nn.Module, str]] = set()
    for layer in layers:
        for part in layer.parts:
            if places[part.tensor] > 1 or (part.module, part.name) in held:
                raise ValueError(
                    f"{caller}: expected tensors of its own in every unit layer, found that "
                    f"{part.name} of a {type(part.module).__name__} in {layer.name} is used in "
                    "a second place too: untie it, or leave the layer out with rule=."
                )
            held.add((part.module, part.name))


def _left_out(places: dict[nn.Module, Place], layers: list[UnitLayer]) -> list[str]:
    """Say of which attentions and MLPs the table has no row."""
    known = {(part.module, part.name) for layer in layers for part in layer.parts}
    modules = {place.name: module for module, place in places.items()}
    reasons: dict[str, None] = {}
    for module, place in places.items():
        for name in _tensor_names(module):
            group = builtin_rule(place.name, module, name)
            if group and (module, name) not in known and Part(module, name, 0, 1, 1).tensor.numel():
                reasons[_why(place.name, KIND_OF[group], modules)] = None
    return list(reasons)


def _why(name: str, kind: str, modules: dict[str, nn.Module]) -> str:
    """Say why the units around a layer are not known."""
    holders = [name.rsplit(".", i)[0] for i in range(1, name.count(".") + 1)]
    for module in (modules[holder] for holder in holders):
        reason = REFUSED.get(forward_class(module))
        if reason:
            return f"the {kind} of {type(module).__name__}: {reason}"
    rows = ATTENTIONS if kind == HEADS else MLPS
    wrapped = next((modules[x] for x in holders if forward_class(modules[x]) in rows), None)
    if wrapped is not None:
        return f"the {kind} of {type(wrapped).__name__}, whose layers are wrapped or computed"
    parent = type(modules[holders[0] if holders else ""]).__name__
    return f"the {kind} of {parent}, a class that is not known"

"""A model's forward cut into steps, so that no batch runs through the same step over and over.

A step is a module that the forward calls once: a block, a patch embedding, a downsampling.
What a finished step gave is kept, and put in its place when the forward runs again; a step in
work is left as soon as it has shown what was asked for. Nothing is known of how the model
wires its steps: that part of the forward, which is cheap, runs every time.
"""

from __future__ import annotations

import copy
import math
import numbers
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, is_dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks

from torch_dimap.masking import Layer
from torch_dimap.reconstruction.watching import Account, Use

_LEVELS = 6  # of a transformer block: qkv, proj, fc1, fc2, and two for cross attention or gates


@dataclass
class Step:
    """A module that a forward calls once.

    Attributes:
        module: the module.
        levels: the layers inside that see their inputs at the same time, in order of use.
        last_user: the index of the last step that uses this one's output.
    """

    module: nn.Module
    levels: list[list[Layer]]
    last_user: float = -1


@dataclass
class Trace:
    """What a forward showed: its steps, and how it uses the layers."""

    steps: list[Step]
    whole: Step  # the model: what to fall back to
    uses: Counter[str]  # label -> how often the layer is used
    biased: set[str]  # labels of the layers whose bias is added
    unclear: set[str]  # labels of those that are used in another way than a linear layer


@dataclass
class _Call:
    """A module's call in a traced forward."""

    module: nn.Module
    used: list[tuple[int, Layer]] = field(default_factory=list)  # with its level
    inside: list[_Call] = field(default_factory=list)
    direct: bool = False  # it uses a layer itself, in no module that it calls

    def levels(self) -> list[list[Layer]]:
        """Return the layers first used in this call, by level."""
        found: dict[int, dict[str, Layer]] = {}
        for level, layer in self.used:
            found.setdefault(level, {})[layer.label] = layer
        return [list(layers.values()) for layers in found.values()]


def trace(model: nn.Module, run: Callable[[], Any], layers: Sequence[Layer]) -> Trace:
    """Run a forward and say in which steps it uses which layers."""
    root = _Call(model)
    stack = [root]
    level, last, version = 0, None, 0
    first_level: dict[str, int] = {}
    uses: Counter[str] = Counter()
    rows: dict[str, set[tuple[int, int]]] = defaultdict(set)

    def seen(use: Use) -> None:
        nonlocal level, last, version
        memory = use.inputs.untyped_storage()
        unknown = use.inputs.is_inference()  # such tensors do not tell when they change
        other = last is None or memory.data_ptr() != last.data_ptr() or use.version != version
        level += unknown or other
        last = memory  # kept alive, so that nothing else comes to lie there
        version = use.version
        uses[use.layer.label] += 1
        rows[use.layer.label].add(use.rows)
        stack[-1].direct = True
        own = first_level.setdefault(use.layer.label, level)
        for call in stack:
            call.used.append((own, use.layer))

    def enter(module: nn.Module, args: Any) -> None:
        call = _Call(module)
        stack[-1].inside.append(call)
        stack.append(call)

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        stack.pop()

    handles = [
        hooks.register_module_forward_pre_hook(enter),
        hooks.register_module_forward_hook(leave),
    ]
    try:
        with Account(layers, seen) as account:
            run()
    finally:
        for handle in handles:
            handle.remove()
    for label, parts in rows.items():
        if any(b < before for (_, before), (b, _) in pairwise(sorted(parts))):
            account.unclear.add(label)  # now whole and now in parts: no one fit serves both
    whole = root.inside[0]
    times = Counter(call.module for call in _all(whole))
    steps = [Step(call.module, call.levels()) for call in _split(whole, times)]
    while len(steps) > 1 and not steps[-1].levels:  # a head, or what only comes after
        steps.pop()
    unclear = account.unclear | account.read & set(uses)
    biased = account.biased - account.bias_read
    return Trace(steps, Step(model, whole.levels()), uses, biased, unclear)


def _all(call: _Call) -> Iterator[_Call]:
    yield call
    for inner in call.inside:
        yield from _all(inner)


def _split(call: _Call, times: Counter[nn.Module]) -> list[_Call]:
    """Cut a call into steps: into what it calls, where that is not too fine or impossible."""
    inside = [inner for inner in call.inside if inner.used or times[inner.module] == 1]
    labels = Counter(label for inner in inside for label in {x.label for _, x in inner.used})
    shared = max(labels.values(), default=0) > 1 or any(times[x.module] > 1 for x in inside)
    if not call.used or len(call.levels()) <= _LEVELS or call.direct or shared:
        return [call]
    return [step for inner in inside for step in _split(inner, times)]


def note_last_users(steps: Sequence[Step], run: Callable[[], Any]) -> None:
    """Find out by a forward which steps use what other steps give.

    The outputs of the steps are leaves of autograd's graph; the inputs of a step then tell
    which of them they were made of.
    """
    if len(steps) == 1:
        return
    leaves: dict[Tensor, int] = {}
    given: list[tuple[int, Tensor]] = []

    def as_leaf(i: int) -> Callable[[Tensor], Tensor]:
        def make(tensor: Tensor) -> Tensor:
            if not tensor.is_floating_point() or tensor.is_inference():
                steps[i].last_user = math.inf
                return tensor
            leaf = tensor.detach().requires_grad_()
            leaves[leaf] = i
            given.append((i, leaf.clone()))
            return given[-1][1]

        return make

    def watched(i: int, forward: Callable) -> Callable:
        def call(*args: Any, **kwargs: Any) -> Any:
            for leaf in _leaves(tensors((args, kwargs))):
                if leaf in leaves:
                    step = steps[leaves[leaf]]
                    step.last_user = max(step.last_user, i)
            with torch.no_grad():
                output = forward(*args, **kwargs)
            return map_tensors(output, as_leaf(i))

        return call

    forwards = [
        (vars(step.module), "forward", watched(i, step.module.forward))
        for i, step in enumerate(steps)
    ]
    with swapped(forwards), torch.enable_grad():
        run()
    for i, tensor in given:
        if tensor._version:  # changed in place: it must be there to be changed again
            steps[i].last_user = math.inf


def _leaves(found: Iterable[Tensor]) -> Iterator[Tensor]:
    """Walk autograd's graph from some tensors back to its leaves."""
    nodes = [tensor.grad_fn for tensor in found if tensor.grad_fn is not None]
    seen = set(nodes)
    while nodes:
        node = nodes.pop()
        if hasattr(node, "variable"):
            yield node.variable
        for before, _ in node.next_functions:
            if before is not None and before not in seen:
                seen.add(before)
                nodes.append(before)


def tensors(value: Any) -> list[Tensor]:
    """List the tensors in nested tuples, lists, dicts and dataclasses."""
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    map_tensors(value, note)
    return found


def map_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Change the tensors in nested tuples, lists, dicts and dataclasses, and nothing else."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(map_tensors(item, change) for item in value))
    if type(value) in (tuple, list):
        return type(value)(map_tensors(item, change) for item in value)
    if isinstance(value, dict):
        changed = copy.copy(value)  # a subclass may be an output with attributes
        for key, item in value.items():
            changed[key] = map_tensors(item, change)
        return changed
    if is_dataclass(value) and not isinstance(value, type):
        other = copy.copy(value)
        for item in fields(value):
            kept = map_tensors(getattr(value, item.name), change)
            object.__setattr__(other, item.name, kept)  # it may be frozen
        return other
    return value


def opaque(value: Any) -> bool:
    """Say whether there is something in a value that may hold tensors out of sight."""
    if isinstance(value, dict):
        return any(map(opaque, value.values()))
    if isinstance(value, (tuple, list)):
        return any(map(opaque, value))
    if is_dataclass(value) and not isinstance(value, type):
        return any(opaque(getattr(value, item.name)) for item in fields(value))
    plain = (Tensor, str, bytes, numbers.Number, torch.dtype, torch.device, type(None))
    return not isinstance(value, plain)


Swap = tuple[dict[str, Any], str, Any]  # a module's table, a key in it, what to put there


@contextmanager
def swapped(entries: Sequence[Swap]) -> Iterator[None]:
    """Put other things into modules' tables for the time of a block."""
    before = [(table, key, table.get(key)) for table, key, _ in entries]
    try:
        for table, key, value in entries:
            table[key] = value
        yield
    finally:
        for table, key, value in before:
            if value is None:
                table.pop(key, None)
            else:
                table[key] = value

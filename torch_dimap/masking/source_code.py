"""Proofs, by the source code of a module's class, that it does nothing but call a layer.

A layer is proven to be only called where all code of the class says ``self.layer(...)``
whenever it names the layer, and where nothing else can get at it. For the latter, the
first parameter of every method, whatever its name, may occur only as the value of an
attribute: an alias, an argument or a returned ``self`` may be read out of sight. What
nn.Module offers, such as ``_modules``, leads to all layers, but for the names listed here.

A bound method that is passed on, as to a checkpoint, is taken for called there. Whatever
is not understood proves nothing. A layer that is held up to date without need
costs a multiplication by its mask; one wrongly left alone computes with old weights.
"""

from __future__ import annotations

import ast
import functools
import inspect
import linecache
import re
import tokenize
import types
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

Definition = ast.FunctionDef | ast.AsyncFunctionDef

# What every module has by being one, less what leads neither to its layers nor to itself.
_LEAD_TO_LAYERS = frozenset(dir(nn.Module())) - {
    "__call__",
    "__class__",
    "__init__",
    "_register_load_state_dict_pre_hook",
    "add_module",
    "extra_repr",
    "forward",
    "register_buffer",
    "register_module",
    "register_parameter",
    "training",
}
# What Python puts into every class, from 3.14 on with a function for the annotations.
_NO_CODE = frozenset({"__dict__", "__weakref__", "__annotate_func__"})
# Attributes that lead from a bound method, or a frame, back to what it belongs to; and
# functions that see the names of the method they are called in.
_LEAD_BACK = frozenset({"__self__", "f_locals"})
_SEE_NAMES = frozenset({"eval", "exec", "locals", "vars"})
_SEQUENCE = {
    "__call__": nn.Module.__call__,
    "__iter__": nn.Sequential.__iter__,
    "forward": nn.Sequential.forward,
}
# What fills weights, and what only counts that a class is used.
_INITIALISERS = ("nn.init.", "torch.nn.init.")
_LOGGERS = frozenset({"_log_api_usage_once"})
# What no_grad() puts around a method: it does nothing but call it.
_NO_GRAD = torch.no_grad()(lambda: None).__code__


class Member(NamedTuple):
    """The code of a function found in a class or its bases."""

    code: types.CodeType
    gets_self: bool
    in_use: bool  # not overridden


class Uses(NamedTuple):
    """The attributes that code calls as ``self.name(...)``, and those it otherwise reads."""

    called: frozenset[str]
    read: frozenset[str]


def only_calls(module: nn.Module, attribute: str) -> bool:
    """Say whether source code proves that a module does nothing but call a layer.

    The layer must be called somewhere: one that no code names is used in a hidden way.

    Args:
        module: the module whose forward uses the layer.
        attribute: the layer's name in it.

    Example:
        >>> attention = nn.MultiheadAttention(8, 2)
        >>> only_calls(attention, "out_proj"), only_calls(nn.Sequential(attention), "0")
        (False, True)
    """
    # What ``module.compile()`` leaves runs the same forward.
    own = (value for name, value in vars(module).items() if name != "_compiled_call_impl")
    if any(_may_know_the_module(value) for value in own):
        return False
    if runs_in_sequence(module):
        return True
    members = _members(type(module))
    uses = _uses_of_all(members) if members is not None else None
    return uses is not None and attribute in uses.called - uses.read


def never_calls(module: nn.Module, attribute: str) -> bool:
    """Say whether source code proves that a module does not call a layer by its name.

    Example:
        >>> never_calls(nn.MultiheadAttention(8, 2), "out_proj")
        True
    """
    members = None if runs_in_sequence(module) else _members(type(module))
    uses = _uses_of_all(members) if members is not None else None
    return uses is not None and attribute not in uses.called


def runs_in_sequence(module: nn.Module) -> bool:
    """Say whether a module's forward is nn.Sequential's: it calls what it holds."""
    kind = type(module)
    return all(getattr(kind, name, None) is method for name, method in _SEQUENCE.items())


def _may_know_the_module(value: Any) -> bool:
    """Say whether an attribute may be code that was made for one instance."""
    if not callable(value) or isinstance(value, (nn.Module, type, types.BuiltinFunctionType)):
        return False
    return not inspect.isfunction(value) or not f"{value.__module__}".startswith("torch.")


def _members(kind: type) -> tuple[Member, ...] | None:
    """Return the code in a class and its bases; None if there is some that hides."""
    found: list[Member] = []
    seen: set[str] = set()
    for base in (base for base in kind.__mro__ if base not in (nn.Module, object)):
        for name, value in vars(base).items():
            codes = _codes(value) if name not in _NO_CODE else []
            if codes is None:
                return None
            gets_self = not isinstance(value, (staticmethod, classmethod))
            found += [Member(code, gets_self, name not in seen) for code in codes]
        seen |= vars(base).keys()
    return tuple(found)


def _codes(value: Any) -> list[types.CodeType] | None:
    """Return the code behind a class's attribute; None if it is of an unknown kind."""
    functions: list[Any]
    if isinstance(value, property):
        functions = [f for f in (value.fget, value.fset, value.fdel) if f is not None]
    elif isinstance(value, functools.cached_property):
        functions = [value.func]
    elif isinstance(value, (staticmethod, classmethod)):
        functions = [value.__func__]
    else:  # what neither binds to an instance nor may know one is data
        is_code = hasattr(type(value), "__get__") or _may_know_the_module(value)
        functions = [value] if is_code else []
    codes = []
    for function in functions:
        while getattr(function, "__code__", None) is _NO_GRAD:
            function = function.__wrapped__
        if not inspect.isfunction(function):
            return None
        codes.append(function.__code__)
    return codes


@functools.cache
def _uses_of_all(members: tuple[Member, ...]) -> Uses | None:
    """Return what the code of a class calls and reads; None if it may read everything."""
    called: frozenset[str] = frozenset()
    read: frozenset[str] = frozenset()
    for code, gets_self, in_use in members:
        uses = _uses(code, gets_self)
        if uses is None:
            return None
        called |= uses.called if in_use else frozenset()
        read |= uses.read
    return Uses(called, read)


@functools.cache
def _uses(code: types.CodeType, gets_self: bool) -> Uses | None:
    """Return what one function calls and reads; None if it may read everything."""
    definition = _definition(code)
    if definition is None:
        return None
    parameters = [*definition.args.posonlyargs, *definition.args.args]
    if gets_self and not parameters:
        return None  # ``*args`` holds it
    first = parameters[0].arg if gets_self else None
    nodes = list(ast.walk(definition))
    attributes = [node for node in nodes if isinstance(node, ast.Attribute)]
    own = {n for n in attributes if _is_name(n.value, first) or _is_super(n.value, first)}
    harmless = _harmless(definition, first)
    in_place = harmless.union(*(ast.walk(node.value) for node in own))
    loose = [node for node in nodes if isinstance(node, ast.Name) and node not in in_place]
    if any(name.id in {first, "super", *_SEE_NAMES} for name in loose):
        return None
    loaded = {node for node in attributes if isinstance(node.ctx, ast.Load)} - harmless
    if {node.attr for node in loaded & own} & _LEAD_TO_LAYERS:
        return None
    functions = {node.func for node in nodes if isinstance(node, ast.Call)}
    called = frozenset(node.attr for node in own & functions)
    read = frozenset(node.attr for node in loaded - functions)
    return None if read & _LEAD_BACK else Uses(called, read)


def _is_name(node: ast.expr, name: str | None) -> bool:
    return isinstance(node, ast.Name) and node.id == name


def _is_super(node: ast.expr, first: str | None) -> bool:
    """Say whether an expression is ``super()`` or ``super(Class, self)``."""
    if not isinstance(node, ast.Call) or not _is_name(node.func, "super") or node.keywords:
        return False
    if len(node.args) == 2:
        return isinstance(node.args[0], ast.Name) and _is_name(node.args[1], first)
    return not node.args


def _harmless(definition: Definition, first: str | None) -> set[ast.AST]:
    """Return the nodes that name a layer or the module, and let nothing get at either.

    They are in calls that drop what they return: of torch.nn.init; of a method's namesake
    in a base, which would run without the method too; and in ``__init__``, of what makes
    weights, fills containers, or logs.
    """
    nodes = list(ast.walk(definition))
    in_init = definition.name == "__init__"
    hands_down = definition.name not in ("__getattr__", "__getattribute__")  # it may rename
    dropped = {node.value for node in nodes if isinstance(node, ast.Expr)}
    ends = dropped | {node.value for node in definition.body if isinstance(node, ast.Return)}
    found: set[ast.AST] = set()
    for call in (node for node in nodes if isinstance(node, ast.Call)):
        name = ast.unparse(call.func)
        if call in dropped and name.startswith(_INITIALISERS):
            weight = {node for argument in call.args[:1] for node in ast.walk(argument)}
            is_plain = all(isinstance(n, (ast.Attribute, ast.Name, ast.Load)) for n in weight)
            found |= weight if is_plain else set()
        elif call in dropped and in_init and name in _LOGGERS:
            found |= set(call.args)
        elif call in dropped and in_init and name == f"{first}.apply":
            its_own = all(_is_attribute(argument, first) for argument in call.args)
            found |= {call.func} if its_own else set()
        elif isinstance(call.func, ast.Attribute) and _is_super(call.func.value, first):
            its_own = call.func.attr == definition.name and hands_down and call in ends
            found |= {call.func} if its_own else set()
        elif isinstance(call.func, ast.Attribute) and in_init:
            fills = call.func.attr in ("add_module", "modules")
            found |= {call.func.value} if fills and _is_attribute(call.func.value, first) else set()
    return found


def _is_attribute(node: ast.expr, first: str | None) -> bool:
    return isinstance(node, ast.Attribute) and _is_name(node.value, first)


def _definition(code: types.CodeType) -> Definition | None:
    """Return the syntax tree that a function was compiled from; None if it is not found.

    The code is asked, since a decorated function gives the source of what it replaces.
    """
    try:
        lines = linecache.getlines(code.co_filename)[code.co_firstlineno - 1 :]
        source = "".join(inspect.getblock(lines))
        [node] = ast.parse(f"if True:\n{source}" if source[0].isspace() else source).body
    except (OSError, SyntaxError, ValueError, IndexError, tokenize.TokenError):
        return None
    [node] = node.body if isinstance(node, ast.If) else [node]
    if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
        return None  # the line of a lambda
    # The file may have been changed since; then it tells of other names.
    words = set(re.findall(r"\w+", source))
    return node if node.name == code.co_name and words.issuperset(_words(code)) else None


def _words(code: types.CodeType) -> Iterator[str]:
    """Yield the words of the names that code, and the code inside it, uses."""
    for name in (*code.co_names, *code.co_varnames):
        if not name.startswith("."):  # which only the compiler uses
            yield from name.split(".")
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _words(constant)

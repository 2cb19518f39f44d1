"""The smallest amount of whole units whose removal makes a model fast enough, measured."""

from __future__ import annotations

import datetime
import numbers
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from torch_dimap.accounting import Inputs, arguments_for, names_in, slim_copy
from torch_dimap.budgets.smallest import smallest
from torch_dimap.budgets.timing import compare_times
from torch_dimap.budgets.unit_budgets import Search, Units, plan_search
from torch_dimap.masking import DimapUnstructured, refuse_sharded_model
from torch_dimap.units import KeptUnits, group_units, plan_units

CALL = "prune_units_to_latency()"
STEPS = 64  # finer ones would differ by less than times do from run to run
_PARTS = 1_000_000  # ratios of times, as whole numbers for the search


class LatencyBudget(NamedTuple):
    """How a budget of time was met, in seconds on the device that was measured.

    Attributes:
        amount: group -> amount of its unmasked units that went, as
            :func:`torch_dimap.global_module_aware_structured` takes it.
        units: group -> thresholds and how many units each layer keeps, as that returns them.
        target: what was asked for.
        predicted: what the search measured at this amount.
        reached: what was measured again, once the search had ended; at most ``target``.
        dense: the time of the model with nothing removed.
    """

    amount: dict[str, float]
    units: dict[str, KeptUnits]
    target: float
    predicted: float
    reached: float
    dense: float


def prune_units_to_latency(
    model: nn.Module,
    inputs: Inputs,
    target: float | datetime.timedelta,
    device: torch.device | str | None = None,
    units: Units | None = None,
    fixed: Mapping[str, float] | None = None,
    importance_scores: Mapping[Any, Tensor] | None = None,
    minimum: int = 1,
    multiple: int = 16,
) -> LatencyBudget:
    """Mask the smallest amount of units whose removal makes a forward fast enough.

    Nothing is derived from FLOPs: copies of the model with units cut out run on the device,
    a forward in evaluation mode each, in turns with a dense copy. The amount is searched in
    64ths by the median of the ratios of the turns, which a passing load on the machine
    leaves alone; it is then measured again, and raised until that meets the target too. The
    times are those of ``inputs``: give the batch that matters. Run on an idle machine, with
    the number of threads that will be used. Nothing is cut from the model itself: train it,
    then call :func:`torch_dimap.remove_units`.

    Args:
        model: the model, masked in place.
        inputs: what to call the model with, as in :func:`torch_dimap.count_flops`.
        target: float in [0, 1], the fraction of the dense model's time, which is that of
            the model before the call, without its masks and with all its units; or a
            ``datetime.timedelta``, the time of a forward.
        device: where to measure. Default: where the model is; there must be room for two
            copies of it.
        units: as in :func:`torch_dimap.prune_units_to_flops`, as are ``fixed``,
            ``importance_scores``, ``minimum`` and ``multiple``.

    Returns:
        The amounts of the groups, what each layer keeps, and the times. All of them are
        ratios to the dense model's time, multiplied by its median in the first comparison.

    Raises:
        TypeError, ValueError: for a compiled model; a target of a wrong type, out of
            range, or shorter than what is measured if all goes that may (the message names
            the shortest); unknown groups in ``fixed``, or none left free; and as
            :func:`torch_dimap.global_module_aware_structured`.

    Example:
        >>> import timm, torch
        >>> vit = timm.create_model("vit_tiny_patch16_224", depth=2)
        >>> budget = prune_units_to_latency(vit, torch.zeros(2, 3, 224, 224), 0.8)
        >>> budget.reached <= budget.target < budget.dense
        True
    """
    _check_target(target)
    if hasattr(model, "_orig_mod"):
        raise TypeError(
            f"{CALL}: model must be a plain module, found one from torch.compile, whose copies "
            "would be timed without it: pass the module that it wraps."
        )
    inputs = arguments_for(model, inputs, CALL)
    refuse_sharded_model(model, CALL)  # of which there are no smaller copies
    listed = group_units(model) if units is None else units
    plan = plan_units(listed, importance_scores, minimum, multiple, DimapUnstructured, CALL)
    search = plan_search(plan, fixed, STEPS)
    names_in(model, search.alive, CALL)
    measure, dense = _start(model, inputs, device, search)
    if isinstance(target, datetime.timedelta):
        seconds = target.total_seconds()
    else:
        seconds = float(target) * dense
    wanted = int(seconds / dense * _PARTS)
    _refuse_unless(measure(STEPS) <= wanted, search, seconds, measure(STEPS), dense)
    step, predicted = smallest(measure, wanted, STEPS)
    reached = measure(step, again=True)
    while reached > wanted:
        _refuse_unless(step < STEPS, search, seconds, reached, dense)
        step += 1
        predicted, reached = measure(step), measure(step, again=True)
    mine, again = predicted * dense / _PARTS, reached * dense / _PARTS
    return LatencyBudget(search.amounts(step), search.mask(step), seconds, mine, again, dense)


def _check_target(target: Any) -> None:
    if isinstance(target, datetime.timedelta):
        return
    if isinstance(target, numbers.Integral) or not isinstance(target, numbers.Real):
        raise TypeError(
            f"{CALL}: target must be a float (a fraction of the dense model's time) or a "
            f"datetime.timedelta, found {type(target).__name__}."
        )
    if not 0.0 <= float(target) <= 1.0:  # NaN fails it too
        raise ValueError(
            f"{CALL}: target as a float must lie in [0, 1], found {target}: a time is given as "
            "a datetime.timedelta."
        )


def _refuse_unless(met: bool, search: Search, seconds: float, parts: int, dense: float) -> None:
    if not met:
        raise ValueError(
            f"{CALL}: target must be at least the {parts * dense / _PARTS:.3g} s "
            f"({parts / _PARTS:.3f} of the dense model's {dense:.3g} s) measured when all goes "
            f"that {search.limits} allow, found {seconds:.3g} s: raise it, or let more go."
        )


def _start(
    model: nn.Module, inputs: Tensor | tuple | dict[str, Any], device: Any, search: Search
) -> tuple[Callable[..., int], float]:
    """Return what measures a step, in millionths of the dense time, and that in seconds."""
    place = next(model.parameters()).device if device is None else torch.device(device)
    moved = _moved(inputs, place)
    dense = slim_copy(model, {}).to(place).eval()

    def compare(step: int) -> tuple[float, float]:
        slim = slim_copy(model, search.stay(step)).to(place).eval()
        return compare_times(slim, dense, moved, place)

    ratio, seconds = compare(STEPS)
    whole = tuple(layer.units for layer in search.alive)
    known = {_kept(search, STEPS): round(ratio * _PARTS), whole: _PARTS}  # whole: dense itself

    def measure(step: int, again: bool = False) -> int:
        kept = _kept(search, step)
        if kept not in known or (again and kept != whole):
            known[kept] = round(compare(step)[0] * _PARTS)
        return known[kept]

    return measure, seconds


def _moved(inputs: Tensor | tuple | dict[str, Any], place: torch.device) -> tuple | dict[str, Any]:
    """Put what a model is called with on a device."""
    if isinstance(inputs, dict):
        return dict(zip(inputs, _moved(tuple(inputs.values()), place)))
    listed = (inputs,) if isinstance(inputs, Tensor) else inputs
    return tuple(x.to(place) if isinstance(x, Tensor) else x for x in listed)


def _kept(search: Search, step: int) -> tuple[int, ...]:
    return tuple(int(keep.count_nonzero()) for keep in search.stay(step).values())

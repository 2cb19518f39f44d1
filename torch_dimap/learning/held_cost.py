"""A cost that training is to hold: a penalty whose weight grows while the target is missed."""

from __future__ import annotations

import math
import numbers
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor


class HeldCost:
    """Hold the share of a model's cost that is kept at a target, by a Lagrangian.

    With the share ``R`` that is kept and the target ``a``, the loss gets
    ``beta * (a - R)**2 + gamma * (a - R)``. Training lowers it; the multiplier ``gamma``
    moves the other way, ``gamma += eta * (a - R)`` after each step, so it presses harder for
    as long as the target is missed, on whichever side. If ``gamma`` followed the loss
    downwards it would run away instead, and nothing would be held.

    Whoever counts the share that is *removed* passes ``1 - removed`` here, and to ``target``.

    Args:
        target: the share of the cost to keep, in (0, 1).
        beta: the weight of the square, fixed.
        eta: how far the multiplier moves in a step, per unit of what is missing.
        tolerance: how near to the target counts as reached.
        window: for how many steps the share must stay there to stand still.

    Raises:
        TypeError, ValueError: for numbers of a wrong type or out of range.

    Example:
        >>> import torch
        >>> held, logit = HeldCost(target=0.4), torch.tensor(2.0, requires_grad=True)
        >>> optimizer = torch.optim.Adam([logit], lr=0.05)
        >>> while not held.stands_still():
        ...     share = logit.sigmoid()
        ...     optimizer.zero_grad()
        ...     held.penalty(share).backward()
        ...     optimizer.step()
        ...     held.update(share.item())
        >>> round(logit.sigmoid().item(), 1)
        0.4
    """

    def __init__(
        self,
        target: float,
        beta: float = 20.0,
        eta: float = 0.05,
        tolerance: float = 0.01,
        window: int = 50,
    ) -> None:
        caller = "HeldCost()"
        for name, value in (("target", target), ("beta", beta), ("eta", eta),
                            ("tolerance", tolerance), ("window", window)):  # fmt: skip
            kind = numbers.Integral if name == "window" else numbers.Real
            if isinstance(value, bool) or not isinstance(value, kind):
                what = "an int" if name == "window" else "a number"
                raise TypeError(f"{caller}: {name} must be {what}, found {type(value).__name__}.")
        if not 0 < target < 1:
            raise ValueError(
                f"{caller}: target must lie between 0 and 1, the share of the cost that is "
                f"kept, found {target}."
            )
        # An infinite weight, or one that is not a number, would end in a loss of the same kind.
        if not (0 <= beta < math.inf and 0 < eta < math.inf and 0 < tolerance < math.inf):
            raise ValueError(
                f"{caller}: beta must be 0 or more, eta and tolerance above 0, all finite, found "
                f"beta={beta}, eta={eta}, tolerance={tolerance}."
            )
        if window < 1:
            raise ValueError(f"{caller}: window must be 1 or more, found {window}.")
        self.target = target
        self.beta = beta
        self.eta = eta
        self.tolerance = tolerance
        self.gamma = 0.0
        self.shares: deque[float] = deque(maxlen=window)  # the last ones, the newest at the end

    def penalty(self, share: Tensor) -> Tensor:
        """Return what the loss gets for a share of the cost that is kept, a scalar."""
        missing = self.target - share
        return self.beta * missing**2 + self.gamma * missing

    def update(self, share: float) -> None:
        """Move the multiplier after a step, and note the share that the step was taken at."""
        if not math.isfinite(share):
            raise ValueError(f"HeldCost.update(): share must be finite, found {share}.")
        self.gamma += self.eta * (self.target - share)
        self.shares.append(share)

    def stands_still(self) -> bool:
        """Tell whether the share has reached its target and stays there."""
        return stands_still(self.shares, self.shares.maxlen or 1, self.tolerance, self.target)

    def state_dict(self) -> dict[str, Any]:
        """Return what changes, for a file: the multiplier and the last shares."""
        return {"gamma": self.gamma, "shares": list(self.shares)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state_dict` returned."""
        if set(state) != {"gamma", "shares"}:
            raise ValueError(
                "HeldCost.load_state_dict(): state must hold gamma and shares, found "
                f"{', '.join(map(str, state)) or 'nothing'}: pass what state_dict() returned."
            )
        self.gamma = float(state["gamma"])
        self.shares.clear()
        self.shares.extend(state["shares"])


def stands_still(
    values: Sequence[float], window: int, tolerance: float, target: float | None = None
) -> bool:
    """Tell whether the last values of a series move no more.

    Args:
        values: one for each step, the newest last.
        window: how many of them count. Fewer never stand still.
        tolerance: how far apart the lowest and the highest of them may lie.
        target: where they must lie besides, each within the tolerance.

    Example:
        >>> stands_still([0.9, 0.5, 0.5, 0.51], window=3, tolerance=0.02)
        True
        >>> stands_still([0.9, 0.5, 0.5, 0.51], window=3, tolerance=0.02, target=0.6)
        False
    """
    if window < 1:
        raise ValueError(f"stands_still(): window must be 1 or more, found {window}.")
    last = list(values)[-window:]
    if len(last) < window or max(last) - min(last) > tolerance:
        return False
    return target is None or max(abs(value - target) for value in last) <= tolerance

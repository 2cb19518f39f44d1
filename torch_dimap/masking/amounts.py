"""How many weights or units an ``amount`` asks for, in torch's convention."""

from __future__ import annotations

import numbers
from collections.abc import Mapping
from typing import Any

from torch_dimap.text import warn


def check_amount(amount: Any, what: str) -> None:
    """Raise unless ``amount`` is an int >= 0 or a float in [0, 1]."""
    if isinstance(amount, bool) or not isinstance(amount, numbers.Real):
        raise TypeError(
            f"{what} must be an int (how many go) or a float (the fraction of them), "
            f"found {type(amount).__name__}."
        )
    if isinstance(amount, numbers.Integral):
        if int(amount) < 0:
            raise ValueError(f"{what} must not be negative, found {amount}.")
    elif not 0.0 <= float(amount) <= 1.0:  # NaN fails it too
        raise ValueError(
            f"{what} as a float must lie in [0, 1], found {amount}: "
            "a number is given as an int."
        )


def count_to_prune(amount: Any, unpruned: int, what: str) -> int:
    """Return how many of ``unpruned`` weights or units a checked ``amount`` stands for."""
    if not isinstance(amount, numbers.Integral):
        return round(float(amount) * unpruned)
    if int(amount) > unpruned:
        raise ValueError(
            f"{what} asks to prune {amount}, but only {unpruned} are unpruned: "
            "lower it, or give a fraction."
        )
    return int(amount)


def amounts_by_group(amount: Any, unpruned: Mapping[str, int], what: str) -> dict[str, float]:
    """Give each group its own amount.

    Args:
        amount: a float, the fraction of every group; a mapping, group -> amount; or an
            int, the total over all groups, shared out in proportion to ``unpruned``
            and exact in sum.
        unpruned: group -> number of unpruned weights or units.
        what: the argument's name for messages.

    Returns:
        Group -> amount, in the order of ``unpruned``.

    Raises:
        TypeError, ValueError: as :func:`check_amount`; also for unknown or missing
            groups and for a count above what is unpruned.
    """
    if isinstance(amount, Mapping):
        unknown = [key for key in amount if key not in unpruned]
        missing = [key for key in unpruned if key not in amount]
        if unknown or missing:
            raise ValueError(
                f"{what} must name the groups {list(unpruned)}, found {list(amount)}: "
                "give 0.0 to a group that is to stay as it is."
            )
        amounts = {group: amount[group] for group in unpruned}
    elif isinstance(amount, numbers.Integral) and not isinstance(amount, bool):
        check_amount(amount, what)
        count_to_prune(amount, sum(unpruned.values()), what)
        amounts = _share(int(amount), unpruned)
    else:
        amounts = dict.fromkeys(unpruned, amount)
    for group, own in amounts.items():
        where = f"{what}[{group!r}]" if isinstance(amount, Mapping) else what
        check_amount(own, where)
        count_to_prune(own, unpruned[group], where)
    return amounts


def warn_of_few(amount: Any, unpruned: int, what: str) -> None:
    """Warn of a total that is next to nothing, as 50 is where 50 % is meant."""
    if isinstance(amount, numbers.Integral) and 0 < 1000 * int(amount) < unpruned:
        warn(
            f"{what} is an int, {amount} of {unpruned:,} weights in all, less than one in a "
            "thousand: a fraction is given as a float, such as 0.5 for half of them."
        )


def _share(total: int, sizes: Mapping[str, int]) -> dict[str, int]:
    """Split ``total`` in proportion to ``sizes`` by largest remainders."""
    whole = max(1, sum(sizes.values()))
    shares = {group: total * size // whole for group, size in sizes.items()}
    by_remainder = sorted(sizes, key=lambda group: -(total * sizes[group] % whole))
    for group in by_remainder[: total - sum(shares.values())]:
        shares[group] += 1
    return shares

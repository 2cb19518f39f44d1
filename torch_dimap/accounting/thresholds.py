"""Thresholds that a caller hands back, to be shown or saved."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable, Mapping


def check_thresholds(thresholds: object, groups: Iterable[str], caller: str) -> None:
    """Raise unless ``thresholds`` is None, or some groups' finite numbers."""
    if thresholds is None:
        return
    if not isinstance(thresholds, Mapping):
        raise TypeError(
            f"{caller}: thresholds must be a mapping group -> threshold, as the pruning call "
            f"returned it, found {type(thresholds).__name__}."
        )
    unknown = [group for group in thresholds if group not in groups]
    if unknown:
        raise ValueError(
            f"{caller}: thresholds must be for the groups {list(groups)}, found {unknown[0]!r}."
        )
    for group, threshold in thresholds.items():
        if not isinstance(threshold, numbers.Real) or not math.isfinite(threshold):
            raise ValueError(
                f"{caller}: thresholds[{group!r}] must be a finite number, as the pruning call "
                f"returned it, found {threshold!r}."
            )

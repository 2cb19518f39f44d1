"""Words that several messages share."""

from __future__ import annotations

from collections.abc import Sequence


def name_some(names: Sequence[str]) -> str:
    """List at most three names, then a count.

    >>> name_some(["a", "b", "c", "d", "e"])
    'a, b, c and 2 more'
    """
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more

"""How does pruning go with other people's training loops? A schedule, and callbacks on it.

The callbacks are in modules of their own, which import their framework:
``torch_dimap.integrations.lightning`` and ``torch_dimap.integrations.transformers``.
"""

from torch_dimap.integrations.schedule import PruningSchedule

__all__ = [
    "PruningSchedule",
]

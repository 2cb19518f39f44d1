"""When how much goes: pruning in rounds along a curve, in any training loop."""

from __future__ import annotations

import hashlib
import numbers
from collections.abc import Callable, Mapping
from typing import Any

import torch.distributed as dist
from torch.nn.utils import prune

from torch_dimap.integrations.goals import Prunable, find_prunable
from torch_dimap.masking import DimapUnstructured, amounts_by_group, count_to_prune
from torch_dimap.sharding import is_sharded

# Name -> how much of the amount is gone once a share of the rounds is done.
CURVES: dict[str, Callable[[float], float]] = {
    "cubic": lambda done: 1 - (1 - done) ** 3,
    "linear": lambda done: done,
    "one-shot": lambda done: 1.0,
}


class PruningSchedule:
    """Prune in rounds while a model is trained, and know how far that is after a resume.

    Rounds are at the steps ``begin``, ``begin + every`` and so on, the last of them at
    ``end`` or the nearest before it, and in ``curve`` it is told how much is gone after
    each. After round ``i`` of ``n`` it is, with ``amount`` for the whole:

    - ``"cubic"``: ``amount * (1 - (1 - i / n) ** 3)``, as Zhu and Gupta have it: much is
      pruned early, while there is plenty, and little late.
    - ``"linear"``: ``amount * i / n``.
    - ``"one-shot"``: ``amount``, all in the first round. So is the rest with ``end == begin``.

    A step is what you count: updates, epochs. Counts are exact after every round: of each
    group ``round(share * size)`` entries are gone, those that went before included.

    The masks are put on right here, with nothing masked yet, so that state dicts have the
    same names from the first step to the last: an optimizer, an EMA, and the checkpoint of
    an earlier run fit a model that has just been built and given a schedule.

    In several processes each prunes for itself, and it is checked that all come to the same
    masks; so every one of them has to call :meth:`step`.

    Args:
        parameters: what is pruned, group by group: weights, as :func:`group_parameters`
            returns them, or units, as :func:`group_units` does.
        amount: of all weights or units, pruned ones included: float, the fraction of every
            group; int, the total over all groups; dict, group -> float or int.
        begin: the step of the first round.
        end: the step that no round comes after. Default: ``begin``.
        every: steps from round to round.
        curve: ``"cubic"``, ``"linear"`` or ``"one-shot"``.
        pruning_method: as in :func:`global_module_aware_unstructured`.

    Attributes:
        steps: the steps at which there are rounds.
        goals: group -> how many entries are gone after the last round.
        rounds_done: how many rounds there have been.

    Raises:
        TypeError, ValueError: for steps that are no whole numbers or out of order, an
            unknown curve, more units than can go while each layer keeps one, and as the
            pruning calls for the rest.

    Source: Zhu and Gupta, "To prune, or not to prune", arXiv 1710.01878, Eq. 1, whose first
    step, at which nothing goes, lies one interval before ``begin``.

    Example:
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Linear(10, 10), nn.Linear(10, 10))
        >>> schedule = PruningSchedule([(x, "weight") for x in net], 0.8, end=20, every=10)
        >>> for step in range(30):  # in a training loop, before each update
        ...     if schedule.step(step):
        ...         print(step, f"{schedule.density:.3f}")
        0 0.435
        10 0.230
        20 0.200
    """

    def __init__(
        self,
        parameters: Prunable,
        amount: float | Mapping[str, float],
        *,
        begin: int = 0,
        end: int | None = None,
        every: int = 1,
        curve: str = "cubic",
        pruning_method: Callable[..., prune.BasePruningMethod] = DimapUnstructured,
    ) -> None:
        caller = "PruningSchedule()"
        end = begin if end is None else end
        for name, value, least in (("begin", begin, 0), ("end", end, begin), ("every", every, 1)):
            if isinstance(value, bool) or not isinstance(value, numbers.Integral):
                raise TypeError(f"{caller}: {name} must be an int, found {type(value).__name__}.")
            if value < least:
                raise ValueError(f"{caller}: {name} must be {least} or more, found {value}.")
        if curve not in CURVES:
            raise ValueError(f"{caller}: curve must be among {', '.join(CURVES)}, found {curve!r}.")
        self._what = find_prunable(parameters, pruning_method, caller)
        self._sizes = self._what.sizes()
        amounts = amounts_by_group(amount, self._sizes, f"{caller}: amount")
        self.goals = {g: count_to_prune(amounts[g], n, caller) for g, n in self._sizes.items()}
        for group, most in self._what.most(caller).items():
            if self.goals[group] > most:
                raise ValueError(
                    f"{caller}: amount must leave every layer a unit: of {group!r} at most {most} "
                    f"of {self._sizes[group]} can go, found {self.goals[group]}: lower it."
                )
        self.steps = range(begin, end + 1, every)
        self.curve = curve
        self.rounds_done = 0
        self._resumed = False
        if any(mask is None for mask in self._what.masks()):
            self._what.prune(dict.fromkeys(self._sizes, 0))

    def rounds_before(self, n: int) -> int:
        """Return how many rounds come before step ``n``."""
        return sum(step < n for step in self.steps)

    def gone_after(self, rounds: int) -> dict[str, int]:
        """Return for each group how many entries are to be gone after so many rounds."""
        share = CURVES[self.curve](rounds / len(self.steps)) if rounds else 0.0
        return {group: round(share * goal) for group, goal in self.goals.items()}

    @property
    def density(self) -> float:
        """The fraction of weights or units that the masks keep now."""
        return sum(self._what.left().values()) / max(1, sum(self._sizes.values()))

    def lacks_masks(self) -> bool:
        """Tell whether nothing is masked, though it should be after the rounds so far."""
        return self.density == 1.0 and any(self.gone_after(self.rounds_done).values())

    def step(self, n: int) -> dict[str, float] | None:
        """Prune if a round is due at step ``n`` or was since the last call.

        Args:
            n: the step that comes next, counted from 0.

        Returns:
            Group -> threshold, the highest score that went, after a round; else None.

        Raises:
            RuntimeError: if processes come to different masks; if :meth:`load_state_dict`
                tells of rounds and the model, whose own state was not loaded, has no masks.
        """
        if self._resumed and self.lacks_masks():
            raise RuntimeError(
                "PruningSchedule.step(): after load_state_dict() the model must have the masks of "
                f"the rounds before, {self.rounds_done}, found none: load the model's own state, "
                "too, before the next step."
            )
        self._resumed = False
        rounds = self.rounds_before(n + 1) if self._is_due(n) else 0
        if rounds <= self.rounds_done:
            return None
        left = self._what.left()
        goals = self.gone_after(rounds)
        counts = {g: max(0, goals[g] - size + left[g]) for g, size in self._sizes.items()}
        thresholds = self._what.prune(counts)
        self._check_processes()
        self.rounds_done = rounds
        return thresholds

    def state_dict(self) -> dict[str, Any]:
        """Return how far the schedule is, and its settings. The masks are in the model's."""
        return {"rounds_done": self.rounds_done, **self._settings()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on where a schedule of the same settings was.

        Raises:
            ValueError: if the settings were others.
        """
        now = self._settings()
        other = [name for name in now if state_dict.get(name) != now[name]]
        if other:
            raise ValueError(
                f"PruningSchedule.load_state_dict(): {other[0]} must be what it was when the state "
                f"was saved, {state_dict.get(other[0])}, found {now[other[0]]}: build the schedule "
                "with the same arguments, or start without its old state."
            )
        self.rounds_done = state_dict["rounds_done"]
        self._resumed = True

    def _is_due(self, n: int) -> bool:
        """Tell cheaply whether the next round's step has come."""
        return self.rounds_done < len(self.steps) and n >= self.steps[self.rounds_done]

    def _settings(self) -> dict[str, Any]:
        return {
            "steps": [self.steps[0], self.steps[-1], self.steps.step],
            "curve": self.curve,
            "goals": dict(self.goals),
        }

    def _check_processes(self) -> None:
        if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
            return
        digest = hashlib.sha256()
        for mask in self._what.masks():
            if mask is not None and not is_sharded(mask):  # of which each has another part
                digest.update(mask.bool().cpu().numpy().tobytes())
        digests = [""] * dist.get_world_size()
        dist.all_gather_object(digests, digest.hexdigest())
        if len(set(digests)) > 1:
            raise RuntimeError(
                "PruningSchedule.step(): the processes must come to the same masks, found others: "
                "do all have the same versions, weights and, for random methods, seeds?"
            )

"""Pruning in rounds while a transformers ``Trainer`` trains: the extra ``[transformers]``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from torch_dimap.integrations.goals import Prunable
from torch_dimap.integrations.schedule import PruningSchedule
from torch_dimap.masking import group_parameters


class PruningCallback(TrainerCallback):
    """Prune a model in rounds along a :class:`torch_dimap.PruningSchedule`.

    Pass it to the ``Trainer`` when that is made: the masks are put on then, before weights
    are loaded and before the model is wrapped for several processes. The share of the
    weights that is kept is in ``state.log_history``, and printed, as ``density``.

    A checkpoint holds ``weight_orig`` and ``weight_mask``, which ``from_pretrained`` does not
    know. To resume, fill the model before there is a Trainer, since ``Trainer`` does not rename
    weights as ``from_pretrained`` does and passes over those that it cannot place (transformers
    5.23, https://github.com/huggingface/transformers/issues/43701)::

        torch_dimap.load_pruned(model, folder, masked=True)
        Trainer(model, ..., callbacks=[PruningCallback(...)]).train(resume_from_checkpoint=folder)

    Args:
        amount: as in :class:`torch_dimap.PruningSchedule`, and so are the next four.
        begin: the update, ``state.global_step``, that the first round comes before.
        end: the update that no round comes after.
        every: updates from round to round.
        curve: ``"cubic"``, ``"linear"`` or ``"one-shot"``.
        parameters: called with the model, returns what is pruned: ``group_parameters``,
            ``group_units`` or a function of your own.

    Attributes:
        schedule: the :class:`torch_dimap.PruningSchedule`, once there is a ``Trainer``.

    Raises:
        RuntimeError: if it was added to a ``Trainer`` after that was made; if a run resumes after
            a round with nothing masked, since its weights were passed over.
    """

    def __init__(
        self,
        amount: float | Mapping[str, float],
        *,
        begin: int = 0,
        end: int | None = None,
        every: int = 1,
        curve: str = "cubic",
        parameters: Callable[[nn.Module], Prunable] = group_parameters,
    ) -> None:
        self.schedule: PruningSchedule | None = None
        self._parameters = parameters
        self._plan: dict[str, Any] = {
            "amount": amount, "begin": begin, "end": end, "every": every, "curve": curve,
        }  # fmt: skip
        self._density = 1.0

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Put the masks on."""
        self.schedule = PruningSchedule(self._parameters(kwargs["model"]), **self._plan)
        self._density = self.schedule.density

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """See that a run that resumes has the masks of the rounds before."""
        schedule = self._ready()
        schedule.rounds_done = schedule.rounds_before(state.global_step)
        if schedule.lacks_masks():
            raise RuntimeError(
                f"PruningCallback: a run that resumes at step {state.global_step} must have masks, "
                "found none: Trainer passes over weights that it cannot place; call "
                "load_pruned(model, folder, masked=True) before the Trainer is made."
            )

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Prune if a round is due before this update."""
        schedule = self._ready()
        if schedule.step(state.global_step) is not None:
            self._density = schedule.density

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Add the density to what is kept of the log, and to what later callbacks print."""
        for entry in (kwargs.get("logs"), *state.log_history[-1:]):
            if entry is not None:
                entry["density"] = self._density

    def _ready(self) -> PruningSchedule:
        if self.schedule is None:
            raise RuntimeError(
                "PruningCallback must be passed as Trainer(callbacks=[...]), found that it was "
                "added later, when it is too late to put masks on."
            )
        return self.schedule

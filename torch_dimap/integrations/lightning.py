"""Pruning in rounds while a Lightning ``Trainer`` trains: the extra ``[lightning]``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from torch_dimap.integrations.goals import Prunable
from torch_dimap.integrations.schedule import PruningSchedule
from torch_dimap.masking import group_parameters, pruned_tensors


class PruningCallback(Callback):
    """Prune a LightningModule in rounds along a :class:`torch_dimap.PruningSchedule`.

    The masks are put on in ``setup``, before a checkpoint is loaded, so that
    ``fit(ckpt_path=...)`` resumes, and an EMA made in training has them. The share of the
    weights that is kept is logged as ``density``.

    A checkpoint holds ``weight_orig`` and ``weight_mask``. ``load_from_checkpoint`` builds the
    module without callbacks, so that has to make room for them itself::

        def on_load_checkpoint(self, checkpoint):
            torch_dimap.prune_like(self, checkpoint["state_dict"])

    or checkpoints are written with ``bake=True``.

    Args:
        amount: as in :class:`torch_dimap.PruningSchedule`, and so are the next four.
        begin: the update, ``trainer.global_step``, that the first round comes before.
        end: the update that no round comes after.
        every: updates from round to round.
        curve: ``"cubic"``, ``"linear"`` or ``"one-shot"``.
        parameters: called with the LightningModule, returns what is pruned:
            ``group_parameters``, ``group_units`` or a function of your own.
        bake: put baked weights under their dense names into the checkpoints, so that they
            load into the dense module; the masks, to resume with, are in the callback's
            state. The model in training stays masked.

    Attributes:
        schedule: the :class:`torch_dimap.PruningSchedule`, from ``setup`` on.

    Raises:
        ValueError: in ``setup``, if a checkpoint callback saves weights only, which asks no
            callback to bake; and as the schedule.
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
        bake: bool = False,
    ) -> None:
        self.schedule: PruningSchedule | None = None
        self._parameters, self._bake = parameters, bake
        self._plan: dict[str, Any] = {
            "amount": amount, "begin": begin, "end": end, "every": every, "curve": curve,
        }  # fmt: skip
        self._module: nn.Module | None = None
        self._density = 1.0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Put the masks on, unless an earlier stage did."""
        if self._bake and any(
            getattr(callback, "save_weights_only", False)
            for callback in trainer.checkpoint_callbacks
        ):
            raise ValueError(
                "PruningCallback(): bake=True must have checkpoints of more than the weights, "
                "found save_weights_only=True, with which Lightning asks no callback: leave that "
                "out, or bake the model that is trained with remove_all."
            )
        if self._module is not pl_module:
            self.schedule = PruningSchedule(self._parameters(pl_module), **self._plan)
            self._module, self._density = pl_module, self.schedule.density
            pl_module._register_load_state_dict_pre_hook(_unbake, with_module=True)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Prune if a round is due before this update."""
        schedule = self._ready()
        if schedule.step(trainer.global_step) is not None:
            self._density = schedule.density
        pl_module.log("density", self._density)

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Bake what is saved, not what is trained."""
        state = checkpoint["state_dict"]
        for label in self._masks() if self._bake else ():
            mask = state.pop(f"{label}_mask") != 0
            state[label] = state.pop(f"{label}_orig").where(mask, 0.0)

    def state_dict(self) -> dict[str, Any]:
        """Return how far the schedule is, and the masks that a baked checkpoint lacks."""
        masks = {
            label: torch.from_numpy(np.packbits(mask.cpu().numpy()))
            for label, mask in (self._masks() if self._bake else {}).items()
        }
        return {"schedule": self._ready().state_dict(), "masks": masks}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where the schedule was."""
        schedule = self._ready()
        schedule.load_state_dict(state_dict["schedule"])
        masks = self._masks()
        for label, packed in state_dict["masks"].items():
            mask = masks[label]
            flags = np.unpackbits(packed.cpu().numpy(), count=mask.numel()).astype(bool)
            mask.copy_(torch.from_numpy(flags).view(mask.shape))
        self._density = schedule.density

    def _ready(self) -> PruningSchedule:
        if self.schedule is None:
            raise RuntimeError("PruningCallback: setup must run first, as a Trainer runs it.")
        return self.schedule

    def _masks(self) -> dict[str, Tensor]:
        return _masks_of(self._module) if self._module is not None else {}


def _masks_of(module: nn.Module) -> dict[str, Tensor]:
    """Return the masks of a module by the names of the masked tensors."""
    labels = [layer.label for layer in pruned_tensors(module, "PruningCallback")]
    return {label: module.get_buffer(f"{label}_mask") for label in labels}


def _unbake(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Let a masked module load a baked checkpoint; the callback's state brings the masks.

    A hook of the module, and a function, since what a module's hooks hold is copied with it.
    """
    for label, mask in _masks_of(module).items():
        if prefix + label in state:
            state[f"{prefix}{label}_orig"] = state.pop(prefix + label)
            state.setdefault(f"{prefix}{label}_mask", mask)

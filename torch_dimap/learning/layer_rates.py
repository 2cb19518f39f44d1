"""How many units should each layer lose? Rates that are learned under a held cost."""

from __future__ import annotations

import contextlib
import math
import numbers
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from torch_dimap.learning.attached import Attached
from torch_dimap.learning.gates import (
    Units,
    gated,
    refuse_diverged,
    refuse_idle,
    straight_through,
)
from torch_dimap.learning.held_cost import HeldCost, stands_still
from torch_dimap.learning.percentiles import (
    KeptShare,
    check_unit_scores,
    count_costs,
    keep_above,
    percentiles_within,
)


class LayerRates(Attached):
    """Learn one pruning rate per layer, while the cost of the whole model is held.

    X-Pruner-style: the threshold of each layer is learned with the weights. A unit is gated
    by where its score lies among its layer's, its percentile ``q``; the layer's rate ``r`` is
    the sigmoid of a free parameter, and what has ``q > r`` stays. The forward multiplies by 0
    and 1, the gradient is that of ``sigmoid((q - r) / temperature)``. Percentiles, and no raw
    scores: those lie so close together that such a gate saturates, and no rate would move.

    The cost is the share of the model's multiply-adds that is kept. ``soft`` counts it by
    the soft gates, which is what is held and has a gradient; ``hard`` by the units that are
    really there. (Were ``soft`` counted by the rates themselves, a layer of one or two heads
    would pretend to lose a third of them and lose none.)

    Gates go on with forward pre-hooks, and no label enters: not here, not in what comes out.
    In a :class:`Joined` the rates train under ``DistributedDataParallel``.

    Args:
        model: the model; its weights are trained along, by the caller's optimizer.
        units: as :func:`torch_dimap.group_units` returns them, with none masked yet.
        importance_scores: unit layer, or its name, -> one number per unit, larger means keep;
            such as :meth:`ClassMasks.scores`.
        inputs: what to call the model with to count multiply-adds.
        held: the cost to hold, as a share of the model's multiply-adds.
        temperature: how wide the gate is, in percentiles.
        initial: the rate of every layer at first.
        minimum: how many units stay in each layer at the least.

    Raises:
        TypeError, ValueError: for arguments of a wrong type or out of range, units that are
            masked already or of another model, scores that are missing or of another
            shape, or a target that cannot be met (the message names the lowest).

    Example:
        >>> import timm, torch, torch_dimap
        >>> vit = timm.create_model("vit_tiny_patch16_224", depth=2, num_classes=10)
        >>> units, images = torch_dimap.group_units(vit), torch.randn(2, 3, 224, 224)
        >>> scores = {x: torch.rand(x.units) for x in units["heads"] + units["neurons"]}
        >>> held = HeldCost(target=0.6)
        >>> rates = LayerRates(vit, units, scores, images[:1], held)
        >>> weights = torch.optim.AdamW(vit.parameters(), lr=1e-4)
        >>> thresholds = torch.optim.Adam(rates.parameters(), lr=0.05)
        >>> for _ in range(2):  # until rates.stand_still()
        ...     (vit(images).logsumexp(1).sum() + rates.penalty()).backward()
        ...     for optimizer in (weights, thresholds):
        ...         optimizer.step()
        ...         optimizer.zero_grad()
        ...     rates.update()
        >>> done = rates.harden()  # masked: train on, then remove_units(vit)
        >>> done.share == rates.hard
        True
    """

    percentiles: Tensor

    def __init__(
        self,
        model: nn.Module,
        units: Units,
        importance_scores: Mapping[Any, Tensor],
        inputs: Tensor | tuple[Any, ...],
        held: HeldCost,
        temperature: float = 0.05,
        initial: float = 0.05,
        minimum: int = 1,
    ) -> None:
        super().__init__()
        caller = "LayerRates()"
        if not isinstance(held, HeldCost):
            raise TypeError(
                f"{caller}: held must be a HeldCost, found {type(held).__name__}: pass "
                "HeldCost(target)."
            )
        for name, value in (("temperature", temperature), ("initial", initial)):
            if not isinstance(value, numbers.Real) or not 0 < value < 1:
                raise ValueError(f"{caller}: {name} must lie between 0 and 1, found {value!r}.")
        self.costs = count_costs(model, inputs, units, minimum, caller)
        self.costs.check(held.target, caller)
        layers = self.costs.layers
        scores = check_unit_scores(layers, importance_scores, caller)
        device = layers[0].read.tensor.device
        # One long tensor, so that a state dict carries the order that the rates were learned on.
        ranks = percentiles_within(scores, range(len(layers)))
        self.register_buffer("percentiles", torch.cat(ranks).float().to(device))
        logit = math.log(initial / (1 - initial))
        self.logits = nn.Parameter(torch.full((len(layers),), logit, device=device))
        self.held = held
        self.temperature = temperature
        self._hard: deque[float] = deque(maxlen=held.shares.maxlen)
        with contextlib.ExitStack() as undo:
            gates = {layer: self._gates_of(i) for i, layer in enumerate(layers)}
            self._applied = undo.enter_context(gated(gates, caller))
            self._undo = undo.pop_all()

    def soft_share(self) -> Tensor:
        """Return the share of the multiply-adds that is kept, by the soft gates: a scalar."""
        layers, each, whole, _ = self.costs
        gone = torch.stack([(1 - self._gate(i)[1]).sum() for i in range(len(layers))])
        return 1 - (gone * gone.new_tensor([cost / whole for cost in each])).sum()

    @property
    def soft(self) -> float:
        """The share of the multiply-adds that is kept, by the soft gates."""
        return float(self.soft_share().detach())

    @property
    def hard(self) -> float:
        """The share of the multiply-adds that is kept, by the units that are left."""
        return self.costs.share(self._keeps())

    def rates(self) -> dict[tuple[str, str], tuple[float, float]]:
        """Return, by layer's name and kind, its rate and the share of its units that goes."""
        return {
            (layer.name, layer.kind): (rate, 1 - float(keep.double().mean()))
            for layer, rate, keep in zip(
                self.costs.layers, self.logits.detach().sigmoid().tolist(), self._keeps()
            )
        }

    def penalty(self) -> Tensor:
        """Return what the loss gets so that the cost is held."""
        return self.held.penalty(self.soft_share())

    def update(self) -> None:
        """Note a step: the multiplier moves, and both shares are remembered.

        Raises:
            RuntimeError: if the model passes by some of the layers that read the units.
        """
        refuse_idle(self.costs.layers, self._applied, "LayerRates.update()")
        self.held.update(self.soft)
        self._hard.append(self.hard)

    def stand_still(self) -> bool:
        """Tell whether the soft share has reached its target, and neither share moves."""
        window = self.held.shares.maxlen or 1
        # One head more or less is a jump, so the hard share may move a little further.
        widest = max(self.costs.each) / self.costs.whole
        tolerance = self.held.tolerance + widest
        return self.held.stands_still() and stands_still(self._hard, window, tolerance)

    def harden(self) -> KeptShare:
        """Mask the units that the rates take, for good, and take the gates from the model.

        The masks are torch's own, as :func:`torch_dimap.global_module_aware_structured` puts
        them: the model gives what it gave with the gates. Train on, then call
        :func:`torch_dimap.remove_units`.

        Returns:
            The share of the multiply-adds that is kept, the hard one, and how many units
            each layer keeps.

        Raises:
            ValueError: if rates have become NaN.
            RuntimeError: if the gates have been taken from the model already.
        """
        caller = "LayerRates.harden()"
        if self._undo is None:
            raise RuntimeError(f"{caller}: the gates are removed from the model: make new ones.")
        done = self.costs.mask(self._keeps(), caller)
        self.remove()
        return done

    def get_extra_state(self) -> dict[str, Any]:
        """Return, for a state dict, what is neither a parameter nor a buffer."""
        return {"held": self.held.state_dict(), "hard": list(self._hard)}

    def set_extra_state(self, state: Any) -> None:
        """Go on from what :meth:`get_extra_state` returned."""
        self.held.load_state_dict(state["held"])
        self._hard.clear()
        self._hard.extend(state["hard"])

    def _keeps(self) -> list[Tensor]:
        """Return for each layer one flag per unit, on the CPU."""
        refuse_diverged([self.logits], "LayerRates")
        return [
            keep_above(own, rate, self.costs.minimum)
            for own, rate in zip(
                self.percentiles.cpu().split([layer.units for layer in self.costs.layers]),
                self.logits.detach().sigmoid().tolist(),
            )
        ]

    def _gate(self, i: int) -> tuple[Tensor, Tensor]:
        """Return a layer's flags, and the soft gates; a unit that must stay has 1 in both."""
        own = self.percentiles.split([layer.units for layer in self.costs.layers])[i]
        rate, minimum = self.logits[i].sigmoid(), self.costs.minimum
        soft = ((own - rate) / self.temperature).sigmoid()
        soft = torch.where(keep_above(own, 1.0, minimum), 1.0, soft)
        return keep_above(own, rate.detach(), minimum), soft

    def _gates_of(self, i: int) -> Callable[[], Tensor]:
        """Return what gives a layer's gates: 0 and 1, with the gradient of a sigmoid."""
        return lambda: straight_through(*self._gate(i))

"""SPViT: which attentions become convolutions or go, and which neurons stay, by training.

Source: He et al., "Pruning Self-attentions into Convolutional Layers in Single Path", TPAMI
2024, arXiv 2111.11802. What differs from the authors' code is told in ``docs/spvit.md``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from torch_dimap.families import original_class, slim_class
from torch_dimap.learning.gates import refuse_diverged
from torch_dimap.learning.held_cost import HeldCost
from torch_dimap.learning.single_path_attention import (
    SinglePathAttention,
    SinglePathBlock,
    decided_gates,
    nested,
    sample_gates,
)
from torch_dimap.learning.single_path_choices import SinglePath, apply_single_path
from torch_dimap.learning.single_path_costs import find_mlps, single_path_costs
from torch_dimap.masking import all_or_nothing, refuse_sharded_model
from torch_dimap.operations import (
    SharedConvolution,
    check_positive,
    default_temperature,
    find_sites,
)

GATES = "gate_logits"


class SinglePathSearch:
    """Gates on the attentions and neurons of a model, trained with it under one cost.

    Each attention gets three nested gates (at least a 1x1 convolution, at least a 3x3 one,
    attention) and each neuron one, all 0 or 1 and drawn anew in every training forward.
    The convolutions are made of the attention's own weights. Train the model as usual,
    with :meth:`penalty` added to the loss and the gates in an optimizer of their own:

        search = SinglePathSearch(model, target=0.6, steps=epochs * len(loader))
        weights = torch.optim.AdamW(search.weights(), lr=1e-4, weight_decay=0.05)
        gates = torch.optim.AdamW(search.gates(), lr=1e-3, weight_decay=0.0)
        for images, labels in loader:
            loss = criterion(model(images), labels) + search.penalty()
            ...                          # backward, a step of both optimizers
            search.update()
        choices = search.finish()        # the model is what was found; fine-tune it

    In evaluation the model runs what the gates have decided so far. The gates and batch
    norms are the model's own parameters until :meth:`finish` or :meth:`remove`, so DDP
    and state dicts have them. Convert the model to another dtype before, not while it is
    searched: gates in bfloat16 could not move in small steps.

    Args:
        model: one of timm's ViTs or Swins, without masks; changed in place.
        target: the share of the dense model's multiply-adds to come down to, in (0, 1).
        steps: how many updates the search will make. What is aimed at comes down from 1 to
            the target over the first half of them, so that no gates close which would have
            to be opened again.
        weight: None holds the cost at what is aimed at, by a multiplier: see
            :class:`HeldCost`. A number is the authors' way: the fixed weight of the squared
            distance to the target, which is aimed at from the beginning, as shares of the
            dense cost. Theirs is per thousand million multiply-adds: multiply it by the
            square of the dense model's.
        temperature: of the softmax over heads; by default the authors', 0.01 for ViTs and
            100 for Swins.
        initial: the gates' first logits; 1.5 lets 82 of 100 be open.

    Raises:
        TypeError, ValueError: for other models or attentions, blocks without an MLP whose
            neurons can go, a target below what is left when all is gone (the message names
            it), or numbers out of range.
        RuntimeError: if attentions or MLPs are pruned.
    """

    def __init__(
        self,
        model: nn.Module,
        target: float,
        steps: int,
        weight: float | None = None,
        temperature: float | None = None,
        initial: float = 1.5,
    ) -> None:
        caller = "SinglePathSearch()"
        if any(isinstance(module, SinglePathAttention) for module in model.modules()):
            raise ValueError(
                f"{caller}: the model must not be searched already, found gates in it: call "
                "finish() or remove() of the other search first."
            )
        check_positive("target", target, caller)
        self.model = model
        self.target = target
        self.steps = steps
        self.weight = weight
        self.done = 0  # updates
        self._held = HeldCost(target, beta=40.0, eta=0.2)
        self._costs = single_path_costs(model, caller)
        sites = find_sites(model, caller)
        refuse_sharded_model(model, caller)
        self._mlps = find_mlps(model, sites, caller)
        lowest = self._costs.fixed / self._costs.dense
        if target < lowest:
            raise ValueError(
                f"{caller}: target must be at least {lowest:.4f}, which is left when all "
                f"attentions and neurons are gone, found {target}: raise it."
            )
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise ValueError(f"{caller}: steps must be an int of 1 or more, found {steps!r}.")
        numbers = {"weight": weight, "temperature": temperature, "initial": initial}
        for name, number in numbers.items():
            if number is not None:
                check_positive(name, number, caller)
        self._attentions: dict[str, SinglePathAttention] = {}
        self._handles: list[Any] = []
        readers = [layer.reader for layer in self._mlps.values()]
        with all_or_nothing([*(site.block for site in sites), *readers]):
            for site in sites:
                cold = default_temperature(site) if temperature is None else temperature
                self._attentions[site.name] = made = SinglePathAttention(site, cold, initial)
                site.block.attn = made
                if site.window is not None:
                    site.block.__class__ = slim_class(type(site.block), SinglePathBlock)
            for layer in self._mlps.values():
                device = layer.read.tensor.device
                logits = nn.Parameter(torch.full((layer.units,), float(initial), device=device))
                layer.reader.register_parameter(GATES, logits)
                self._handles.append(layer.reader.register_forward_pre_hook(_gate_neurons))

    def gates(self) -> list[nn.Parameter]:
        """Return the gates' logits, for an optimizer of their own, without weight decay."""
        return [x for name, x in self.model.named_parameters() if _is_gate(name)]

    def weights(self) -> list[nn.Parameter]:
        """Return all other parameters of the model."""
        return [x for name, x in self.model.named_parameters() if not _is_gate(name)]

    def share(self) -> Tensor:
        """Return the cost of what the gates have decided, as a share of the dense model's.

        A scalar; its gradient reaches the logits.

        Raises:
            RuntimeError: after :meth:`finish` or :meth:`remove`.
        """
        self._check_running()
        operations = torch.stack([
            nested(decided_gates(x.gate_logits)) for x in self._attentions.values()
        ]).double()  # fmt: skip
        neurons = [
            decided_gates(getattr(layer.reader, GATES)).double().sum()
            for layer in self._mlps.values()
        ]
        return self._costs.total(operations, torch.stack(neurons)) / self._costs.dense

    def penalty(self) -> Tensor:
        """Return what is to be added to the loss, a scalar."""
        share = self.share()
        if self.weight is not None:
            return (self.weight * (share - self.target) ** 2).float()
        self._aim()
        return self._held.penalty(share).float()

    def update(self) -> None:
        """Tell that a step is done: the multiplier moves where the target is missed.

        Raises:
            ValueError: if gates have become NaN.
            RuntimeError: after :meth:`finish` or :meth:`remove`.
        """
        refuse_diverged(self.gates(), "SinglePathSearch.update()")
        with torch.no_grad():
            share = float(self.share())
        self._aim()
        self._held.update(share)
        self.done += 1

    def stands_still(self) -> bool:
        """Tell whether the cost has reached its target and stays there.

        Never with a fixed ``weight``: the authors have no rule, and such a search may rest
        anywhere.
        """
        self._aim()
        return self.weight is None and 2 * self.done > self.steps and self._held.stands_still()

    def _aim(self) -> None:
        """Set what is held at this step: it comes down to the target."""
        way = min(1.0, 2 * self.done / self.steps)
        self._held.target = 1 - way * (1 - self.target)

    def choices(self) -> SinglePath:
        """Return what the gates have decided so far.

        Raises:
            ValueError: if gates have become NaN.
            RuntimeError: after :meth:`finish` or :meth:`remove`.
        """
        self._check_running()
        refuse_diverged(self.gates(), "SinglePathSearch.choices()")
        operations = {name: x.decision() for name, x in self._attentions.items()}
        neurons = {
            name: (getattr(layer.reader, GATES).detach() > 0).cpu()
            for name, layer in self._mlps.items()
        }
        counts = [int(keep.sum()) for keep in neurons.values()]
        flops = self._costs.total(list(operations.values()), counts)
        return SinglePath(operations, neurons, flops, flops / self._costs.dense)

    def remove(self) -> nn.Module:
        """Take all gates away: the model has its attentions and neurons, as trained so far."""
        if self._handles:
            self._take_away()
            self._handles = []
        return self.model

    def finish(self, skip: str = "zero") -> SinglePath:
        """Make the model what was found, with the weights that the search has trained.

        Neurons that go are masked by torch's own mechanism, and attentions are replaced,
        as :func:`apply_single_path` does it, which see. Convolutions go on with the shares
        of heads and the batch norms that were trained. Make optimizers and EMAs anew.

        Raises:
            ValueError, RuntimeError: as that; then the search goes on as it was.
        """
        choices = self.choices()
        blocks = [self._block(name) for name in self._attentions]
        with all_or_nothing([*blocks, *(layer.reader for layer in self._mlps.values())]):
            self._take_away()
            apply_single_path(self.model, choices, skip)
        self._handles = []
        for name, trained in self._attentions.items():
            made = self.model.get_submodule(name)
            if isinstance(made, SharedConvolution):
                made.temperature = trained.temperature
                trained.hand_over(made)
        return choices

    def _setting(self) -> dict[str, Any]:
        """Return what an interrupted search must be begun with again."""
        return {"target": self.target, "steps": self.steps, "weight": self.weight}

    def _block(self, attention: str) -> Any:
        return self.model.get_submodule(attention.rpartition(".")[0])

    def _take_away(self) -> None:
        for name, made in self._attentions.items():
            block = self._block(name)
            block.attn = made.attention
            block.__class__ = original_class(type(block))
        for handle in self._handles:
            handle.remove()
        for layer in self._mlps.values():
            layer.reader._parameters.pop(GATES, None)

    def _check_running(self) -> None:
        if not self._handles:
            raise RuntimeError(
                "SinglePathSearch: expected a search that goes on, found that finish() or remove() "
                "has ended it: keep what finish() or choices() returned, or begin another."
            )

    def state_dict(self) -> dict[str, Any]:
        """Return what is not in the model's state dict, for a file."""
        return {**self._setting(), "done": self.done, "held": self._held.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state_dict` returned."""
        caller, own = "SinglePathSearch.load_state_dict()", self._setting()
        if set(state) != {*own, "done", "held"}:
            raise ValueError(
                f"{caller}: state must hold {', '.join(own)}, done and held, found "
                f"{', '.join(map(str, state)) or 'nothing'}: pass what state_dict() returned."
            )
        other = [f"{name}={state[name]}" for name in own if state[name] != own[name]]
        if other:
            raise ValueError(
                f"{caller}: state must be of a search of the same settings, {own}, found "
                f"{', '.join(other)}: begin the search as it was begun."
            )
        self.done = state["done"]
        self._held.load_state_dict(state["held"])


def _gate_neurons(reader: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Multiply what an MLP's last layer takes in by the gates that it carries."""
    logits = getattr(reader, GATES)
    if inputs[0].shape[-1] != len(logits):
        raise RuntimeError(
            f"SinglePathSearch: expected the {len(logits)} neurons that the search began with, "
            f"found {inputs[0].shape[-1]}: remove units before a search, or after its finish()."
        )
    gates = sample_gates(logits) if reader.training else logits.detach() > 0
    return (inputs[0] * gates.to(inputs[0].dtype), *inputs[1:])


def _is_gate(name: str) -> bool:
    return name.rpartition(".")[2] == GATES

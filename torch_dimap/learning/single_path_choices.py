"""What a search of SPViT has chosen, and a model made so."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from torch_dimap.learning.single_path_costs import find_mlps
from torch_dimap.masking import all_or_nothing, refuse_sharded_model
from torch_dimap.operations import find_sites, replace_attentions
from torch_dimap.text import name_some
from torch_dimap.units import mask_units


class SinglePath(NamedTuple):
    """What a search has chosen.

    Attributes:
        operations: name of an attention -> ``"attention"``, ``"conv3"``, ``"conv1"`` or
            ``"skip"``, in the order of blocks.
        neurons: name of an MLP -> one flag per neuron, True for what stays.
        flops: multiply-adds for one image, as :func:`single_path_flops` counts them.
        share: the same as a share of the dense model's.
    """

    operations: dict[str, str]
    neurons: dict[str, Tensor]
    flops: int
    share: float


def apply_single_path(
    model: nn.Module,
    choices: SinglePath,
    skip: str = "zero",
    temperature: float | None = None,
) -> nn.Module:
    """Make a dense model what a search has chosen, ready to be fine-tuned.

    Attentions are replaced as by :func:`replace_attentions`, and the neurons that go are
    masked, by torch's own mechanism. Then train; at the end ``remove_units(model)`` cuts
    the neurons out and :func:`collapse_convolutions` makes plain convolutions.

    Args:
        model: a dense model of the same architecture, with the weights to start from: the
            original ones, as the authors do. It is changed in place.
        choices: what :meth:`SinglePathSearch.choices` or ``finish`` returned.
        skip: as in :func:`replace_attentions`.
        temperature: as there.

    Returns:
        ``model``.

    Raises:
        As :func:`replace_attentions`; and ValueError if the model has other MLPs.
    """
    caller = "apply_single_path()"
    if not isinstance(choices, SinglePath):
        raise TypeError(
            f"{caller}: choices must be a SinglePath, as a search's choices() returns it, found "
            f"{type(choices).__name__}."
        )
    flags = [name for name, keep in choices.neurons.items() if not isinstance(keep, Tensor)]
    if flags:
        raise TypeError(
            f"{caller}: choices.neurons must hold a tensor of flags for each MLP, found others for "
            f"{name_some(flags)}."
        )
    sites = find_sites(model, caller)
    refuse_sharded_model(model, caller)
    layers = find_mlps(model, sites, caller)
    wrong = [
        name for name in layers.keys() | choices.neurons.keys()
        if name not in layers or name not in choices.neurons
        or layers[name].units != len(choices.neurons[name])
    ]  # fmt: skip
    if wrong:
        raise ValueError(
            f"{caller}: choices must be for the MLPs of the model, found {name_some(wrong)} in "
            "one of them only or of another width: build the model that was searched."
        )
    going = {name: layer for name, layer in layers.items() if not choices.neurons[name].all()}
    with all_or_nothing([site.block for site in sites]):
        replace_attentions(model, choices.operations, skip, temperature)
        if going:
            keeps = [choices.neurons[name] for name in going]
            mask_units({"neurons": list(going.values())}, {"neurons": keeps}, caller)
    return model

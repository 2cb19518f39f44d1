"""The kept weights of a masked model refitted on a few unlabelled images."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from torch_dimap.masking import (
    BEFORE_SHARDING,
    Layer,
    Parameters,
    check_layer,
    find_layers_here,
    pruned_tensors,
    show_masked,
)
from torch_dimap.reconstruction.batches import Call, read_batches
from torch_dimap.reconstruction.refitting import Misfit, Refit, gather
from torch_dimap.reconstruction.steps import Trace
from torch_dimap.reconstruction.streams import Stream, dense_weights, other_values
from torch_dimap.reconstruction.study import holders, study
from torch_dimap.sharding import (
    Processes,
    agree,
    processes_of,
    rest_sharded,
    spread_by_plan,
)
from torch_dimap.text import name_some

CALLER = "reconstruct()"


def reconstruct(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    sequential: bool = True,
    damping: float = 0.01,
    groups: Parameters | None = None,
    progress: bool = False,
) -> dict[str, Misfit]:
    """Refit a masked model's kept weights, so that layers give what they gave.

    Pruning leaves the kept weights as they were. Here they are chosen anew, by least squares
    on the inputs that each layer gets from a few images: without labels, without gradients,
    in minutes. The kept entries of ``<name>_orig`` change, and the biases of the layers;
    masks, what they hide and everything else stay. Masks may be of single weights or of whole
    rows and columns, and of biases: what they hide of one does not change.

    The targets are what the dense model gives, which is still behind the masks. So call it
    once, right after pruning: after a training or a second call, what is behind the masks is
    no dense model any more.

    A failure or Ctrl-C leaves the model as it was.

    Of a model that ``fully_shard`` has spread all processes make the call, each with as many
    batches of its own, which count together. A module is gathered while it runs, and so are the
    layers that are refitted together. What one process raises while the others go on they do not
    see: they wait until torch's own time limit, or the end of that process, tells them; no
    weights change then.

    Args:
        model: a pruned model; it is run in evaluation mode and comes back in its own.
        batches: images, as the model takes them: an iterable of tensors, of tuples of
            arguments where it needs several, or of dicts of named ones. Of other tuples, such as
            ``(images, labels)``, only the first entry is used, and of a dict all but
            ``"labels"``. All are kept in memory, and one batch is run at a time. 128 to 512
            images do.
        sequential: True: layer after layer in the order of the forward, each on the inputs
            that it gets from the layers refitted before it. False: each for itself, on the
            inputs of the dense model, which takes about half the time.
        damping: the price of moving a weight, relative to the mean of the inputs' squares,
            above 0; for a layer of d inputs that sees n tokens it is taken 1 + d / n times. More
            holds the weights closer to the old ones. What sums of float32 products leave
            uncertain is never fitted, however small it is.
        groups: ``(module, name)`` pairs to refit, by group or in one list, as
            :func:`torch_dimap.group_parameters` gives them. Default: all masked matrices.
        progress: show a bar.

    Returns:
        The layer's name -> how far its outputs were from those wanted, before and after, as
        a part of their norm.

    Warns:
        UserWarning: for masked weights that the forward does not multiply with, or not as with
            a matrix; for entries of a tuple that may be more than labels.

    Raises:
        TypeError: for arguments of a wrong type.
        ValueError: if there are no masked weights, no images, or NaN in them; if layers are
            used otherwise than linear layers and 1x1 convolutions; for a damping of 0; for
            weights that a tensor-parallel plan has spread.
        RuntimeError: if batches use the layers differently.

    Source: the problem is that of Frantar and Alistarh, "Optimal Brain Compression", 2022
    (arXiv 2208.11580), and "SparseGPT", 2023 (arXiv 2301.00774), for the masks at hand.

    Example:
        >>> from torch_dimap import dimap_unstructured
        >>> net = nn.Sequential(nn.Linear(20, 10), nn.ReLU(), nn.Linear(10, 10))
        >>> for layer in net[0], net[2]:
        ...     _ = dimap_unstructured(layer, "weight", amount=0.5)
        >>> misfits = reconstruct(net, [torch.randn(64, 20), torch.randn(64, 20)])
        >>> all(misfit.after < misfit.before for misfit in misfits.values())
        True
    """
    model = getattr(model, "_orig_mod", model)  # what torch.compile wraps
    processes = _processes_of(model)

    def check() -> tuple[tuple[list[Layer], list[Call]], object]:
        layers = _masked_layers(model, groups)
        check_damping(damping, CALLER)
        asked = [x.label for x in layers], float(damping), bool(sequential)
        return (layers, read_batches(model, batches, CALLER)), asked

    layers, calls = agree(processes, check, CALLER)
    given = [len(calls)] if processes is None else processes.gather_object(len(calls))
    if len(set(given)) > 1:
        raise ValueError(
            f"{CALLER}: all processes must give equally many batches, found "
            f"{', '.join(map(str, given))}: they gather each other's weights once for every batch."
        )
    weights = [dense_weights(_masked_tensors(model)), []]
    studied = study(
        model, calls, layers, weights, CALLER, listed=groups is not None, processes=processes
    )
    with torch.inference_mode(False), studied as (found, call):
        dense = Stream(call, len(calls), found.steps, weights[0])
        masked = Stream(call, len(calls), found.steps, weights[1]) if sequential else None
        shown = progress and (processes is None or processes.rank == 0)
        with tqdm(total=len(found.uses), unit=" layers", disable=not shown) as bar:
            values, misfits = _refit_all(dense, masked, found, damping, bar, processes)
    with torch.inference_mode(False):
        # One that has failed since the last exchange does not come here, so that none goes on.
        agree(processes, lambda: (None, None), CALLER)
        _commit(values)
    return misfits


def _refit_all(
    dense: Stream, masked: Stream | None, found: Trace, damping: float, bar: tqdm,
    processes: Processes | None,
) -> tuple[list[tuple[Layer, Tensor]], dict[str, Misfit]]:
    """Go through the steps of the forward; return new values and what they gain."""
    values: list[tuple[Layer, Tensor]] = []
    misfits: dict[str, Misfit] = {}
    for step in found.steps:
        for level in step.levels if masked else [sum(step.levels, [])]:
            refits = [Refit(layer, layer.label in found.biased) for layer in level]
            gather(refits, dense, masked, found)
            for refit in refits:
                new, misfits[refit.layer.label] = refit.solve(damping, CALLER, processes)
                values += new
                refit.sums.clear()
                bar.update()
            if masked:
                masked.weights[:] = other_values(values)
        dense.advance(found.uses)
        if masked and step is not found.steps[-1]:
            masked.advance()
    return values, misfits


def _processes_of(model: nn.Module) -> Processes | None:
    """Return those that hold parts of the model, if there are several."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{CALLER}: model must be an nn.Module, found {type(model).__name__}.")
    rest_sharded(model.modules())
    if planned := spread_by_plan(model):
        raise ValueError(
            f"{CALLER}: {name_some(planned)} spread by a tensor-parallel plan, and whole layers "
            f"are needed: {BEFORE_SHARDING}."
        )
    return processes_of(model.parameters(), CALLER)


def _masked_layers(model: nn.Module, groups: Parameters | None) -> list[Layer]:
    if groups is not None:
        found = find_layers_here(model, groups, CALLER, "groups")
        listed = [layer for layers in found.values() for layer in layers]
    else:
        listed = _masked_tensors(model)
        for layer in listed:
            check_layer(layer, CALLER)
    for layer in listed:
        if layer.parameter.is_inference():
            raise ValueError(
                f"{CALLER}: {layer.label} was made under torch.inference_mode(), which nothing "
                "can change: build the model outside of it."
            )
    layers = [x for x in listed if x.mask is not None and x.parameter.dim() > 1]
    if not layers:
        raise ValueError(
            f"{CALLER}: {'model' if groups is None else 'groups'} must hold masked weights, found "
            "none: prune first, and call remove_all afterwards."
        )
    held = holders(model)
    tied = [layer.label for layer in layers if held[layer.parameter] > 1]
    if tied:
        raise ValueError(
            f"{CALLER}: weights must belong to one layer each, found {name_some(tied)} tied to "
            "others, which a refit would change too: untie them, or leave them out of groups."
        )
    return layers


def _masked_tensors(model: nn.Module) -> list[Layer]:
    """List a model's masked tensors, each of them once."""
    return list({(x.module, x.name): x for x in pruned_tensors(model, CALLER)}.values())


def check_damping(damping: Any, caller: str) -> None:
    """Raise unless a damping is a positive number."""
    if isinstance(damping, bool) or not isinstance(damping, numbers.Real):
        raise TypeError(f"{caller}: damping must be a number, found {type(damping).__name__}.")
    if not 0.0 < float(damping) < math.inf:
        raise ValueError(
            f"{caller}: damping must be above 0, found {damping}: without it, weights that the "
            "images leave undetermined could become anything."
        )


@torch.no_grad()
def _commit(values: list[tuple[Layer, Tensor]]) -> None:
    """Write new values into the parameters: into all, or into none."""
    before = [layer.parameter.detach().clone() for layer, _ in values]
    modules = {layer.module: None for layer, _ in values}
    try:
        for layer, value in values:
            layer.parameter.copy_(value)
        for module in modules:  # what is read without a forward is old
            show_masked(module)
    except BaseException:
        for (layer, _), value in zip(values, before):
            layer.parameter.copy_(value)
        for module in modules:
            show_masked(module)
        raise

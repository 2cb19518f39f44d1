"""A model readied for a checkpoint: masked where that is masked, dense where it is dense."""

from __future__ import annotations

from torch import nn
from torch.nn.utils import prune

from torch_dimap.files.names import match_names
from torch_dimap.files.planning import layers_to_mask
from torch_dimap.masking import all_or_nothing, attach, bake, hold_masks, pruned_tensors, release
from torch_dimap.sharding import local_of, part_like
from torch_dimap.storage import Checkpoint, name_of, open_weights, read_mask
from torch_dimap.text import name_some


def prune_like(model: nn.Module, checkpoint: Checkpoint) -> nn.Module:
    """Mask in a model just what is masked in a checkpoint, with the same masks.

    A state dict with masks (``weight_orig``, ``weight_mask``) fits only a model that is
    masked in the same places, and one without only a dense model. After this call
    ``model.load_state_dict(...)`` fits, be it your own or that of a framework, such as
    Lightning, accelerate or timm. It puts masks on and takes masks off, and loads no
    weights: :func:`torch_dimap.load_pruned` does both, for a model that you fill yourself.

    Args:
        model: dense or masked. Masks that are taken off are baked, as by
            :func:`torch_dimap.remove_all`. What the checkpoint knows nothing of stays.
        checkpoint: a state dict, or a dict that holds one, as ``torch.load`` returns it; or
            the path of a file or of a Hugging Face folder. Names may have a wrapper's
            prefix, here or there: ``model.``, ``module.``, ``net.``, ``_orig_mod.``.

    Returns:
        ``model``. Parameters stay the same objects, in the same order.

    Raises:
        TypeError: for arguments of other types.
        ValueError: if the checkpoint is damaged, holds nothing of the model's, or masks of
            tensors that the model does not have or has in another shape.
        RuntimeError: if an earlier pruning of a tensor is incomplete.
        OSError: if the file cannot be read.

    Example:
        >>> from torch_dimap import dimap_unstructured
        >>> trained = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 2))
        >>> _ = dimap_unstructured(trained[0], "weight", amount=0.5)
        >>> state = trained.state_dict()
        >>> fresh = prune_like(nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 2)), state)
        >>> fresh.load_state_dict(state)
        <All keys matched successfully>
    """
    caller = "prune_like()"
    if not isinstance(model, nn.Module):
        raise TypeError(f"{caller}: model must be an nn.Module, found {type(model).__name__}.")
    masked = {layer.label: layer for layer in pruned_tensors(model, caller)}
    shapes = _shapes(model, set(masked))
    where = f"{caller}: {name_of(checkpoint)}"
    with open_weights(checkpoint, in_memory=True) as weights:
        names = match_names(weights.entries, shapes, model)
        entries = {names[name]: entry for name, entry in weights.entries.items() if name in names}
        if not any(name in shapes for name in entries):
            raise ValueError(
                f"{where} must hold weights of {type(model).__name__}, found none: its names "
                f"begin with {name_some(list(weights.entries))}."
            )
        wanted = {name: entry for name, entry in entries.items() if entry.masked}
        wrong = [name for name, e in wanted.items() if shapes.get(name) != e.kind.shape]
        if wrong:
            raise ValueError(
                f"{where} must have masks of tensors of {type(model).__name__}, found "
                f"{name_some(wrong)} not in it or of another shape: build the model that it was "
                "written from; one of fewer units comes back with load_pruned."
            )
        masks = {name: read_mask(entry) for name, entry in wanted.items()}
    new = layers_to_mask(model, [name for name in wanted if name not in masked], caller)
    old = {(x.module, x.name): x for n, x in masked.items() if n in entries and n not in wanted}
    with all_or_nothing(layer.module for layer in new.values()):
        for name, layer in new.items():
            mask = part_like(masks[name], layer.parameter)
            attach(layer, prune.Identity(), mask.to(layer.parameter.device))
    for name in masks.keys() & masked.keys():
        _, module, own = masked[name]
        mask = module.get_buffer(f"{own}_mask")
        local_of(mask).copy_(part_like(masks[name], mask))
    for layer in old.values():
        bake(layer)
    for module in model.modules() if old else ():
        release(module)
    return hold_masks(model)


def _shapes(model: nn.Module, masked: set[str]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a model's state, pruned tensors under their own names."""
    shapes = {}
    for name, tensor in model.state_dict().items():
        if name.removesuffix("_mask") in masked and name.endswith("_mask"):
            continue
        base = name.removesuffix("_orig")
        shapes[base if base in masked else name] = tuple(tensor.shape)
    return shapes

"""Dead units cut out of a model: smaller tensors, the same outputs."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from torch_dimap.families import slim_class
from torch_dimap.masking import (
    Layer,
    bake,
    known_readers,
    pruned_tensors,
    pruning_methods,
    refuse_sharded,
    release,
)
from torch_dimap.text import name_some
from torch_dimap.units.counts import note_cut
from torch_dimap.units.description import Part, UnitLayer
from torch_dimap.units.grouping import UnitRule, describe_units

CALL = "remove_units()"
ELSEWHERE = (
    "write it with save_pruned, load that in one process by load_pruned(model, path, masked=True), "
    "cut it there, and shard the smaller model"
)


class Cut(NamedTuple):
    """A part's tensors without the units that go."""

    part: Part
    tensor: Tensor
    mask: Tensor | None


def remove_units(model: nn.Module, rule: UnitRule | None = None) -> nn.Module:
    """Cut out every attention head and neuron of which nothing is read.

    A unit is dead where the layer that reads it has only zeros for it, by a mask or in
    its weights: after :func:`global_module_aware_structured`, and also after
    :func:`remove_all` or an unstructured pruning. It goes from every tensor that holds
    it, and the numbers that modules keep (``num_heads``, ``in_features``) follow, so the
    model gives the same outputs and gradients up to rounding, faster. Units that are dead
    only in part stay, with their masks; a mask that has nothing left to hide is removed.

    What is cut gets **new parameters**: make the optimizer, an EMA and a
    ``DistributedDataParallel`` wrapper anew afterwards. Their names do not change.

    Args:
        model: the model; it is changed in place.
        rule: as for :func:`group_units`, if the units were grouped with one.

    Returns:
        ``model``.

    Raises:
        TypeError: if ``model`` is no module, or wrapped by ``DistributedDataParallel``.
        ValueError: if a tensor that holds units is tied to another.
        RuntimeError: if units are dead in a layer that mixes them, as a norm over its
            neurons does: without them its outputs would be others. Or if an earlier
            pruning of a tensor is incomplete.

    Example:
        >>> import timm, torch, torch_dimap
        >>> vit = timm.create_model("vit_tiny_patch16_224", depth=2).eval()
        >>> units = torch_dimap.group_units(vit)
        >>> _ = torch_dimap.global_module_aware_structured(units, amount=0.5)
        >>> image = torch.randn(1, 3, 224, 224)
        >>> masked = vit(image)
        >>> torch.allclose(remove_units(vit)(image), masked, atol=1e-5)
        True
        >>> sum(block.attn.num_heads for block in vit.blocks)
        3
    """
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise TypeError(
            f"{CALL}: model must be a plain module, found a DistributedDataParallel, which would "
            "not average the gradients of new parameters: pass model.module, and wrap it anew."
        )
    layers = describe_units(model, rule, CALL)
    deque(pruned_tensors(model, CALL), maxlen=0)  # all are sound, or nothing changes
    refuse_sharded([(x.name, part.tensor) for x in layers for part in x.parts], CALL, ELSEWHERE)
    keeps = {x: keep for x in layers if not (keep := x.staying(x.alive())).all()}
    obstacles = [f"{layer.name} ({layer.obstacle})" for layer in keeps if layer.obstacle]
    if obstacles:
        raise RuntimeError(
            f"{CALL}: expected dead units only where they can be removed exactly, found some in "
            f"{name_some(obstacles)}: leave these layers unpruned."
        )
    cut_units(keeps)
    for layer in layers:
        _drop_idle_masks(layer)
    return model


def cut_units(keeps: Mapping[UnitLayer, Tensor]) -> None:
    """Cut unit layers down to the units that are to stay, whether the others are dead or not.

    Args:
        keeps: unit layer -> one flag per unit, True for what stays. A layer whose forward
            needs a unit keeps its first where none is to stay.
    """
    planned = []
    for layer, keep in keeps.items():
        keep = layer.staying(keep)
        planned.append((layer, keep, [_cut(part, keep) for part in layer.parts]))
    for layer, keep, cuts in planned:
        for cut in cuts:
            _put(cut)
        _follow(layer, int(keep.count_nonzero()))
        note_cut(layer, int(keep.count_nonzero()))


def _cut(part: Part, keep: Tensor) -> Cut:
    """Copy what is to stay of a part."""
    index = part.along(keep.to(part.tensor.device)).nonzero().squeeze(1)
    mask = None if part.mask is None else part.mask.index_select(part.dim, index)
    return Cut(part, part.tensor.detach().index_select(part.dim, index), mask)


def _put(cut: Cut) -> None:
    """Put a part's smaller tensors in the place of the present ones."""
    module, name = cut.part.module, cut.part.name
    if name in module._buffers:
        module._buffers[name] = cut.tensor
        return
    behind = name if cut.mask is None else f"{name}_orig"
    learns = cut.part.tensor.requires_grad
    module._parameters[behind] = nn.Parameter(cut.tensor, learns)
    if cut.mask is not None:
        module._buffers[f"{name}_mask"] = cut.mask
        method = next(m for m in pruning_methods(module) if m._tensor_name == name)
        with torch.no_grad():
            setattr(module, name, method.apply_mask(module))


def _drop_idle_masks(layer: UnitLayer) -> None:
    """Remove the masks that hide nothing any more."""
    for part in layer.parts:
        if part.mask is not None and part.mask.all():
            bake(Layer(layer.name, part.module, part.name))
    for reader in known_readers(part.module for part in layer.parts):
        release(reader)


def _follow(layer: UnitLayer, units: int) -> None:
    """Set the numbers that modules keep of their units and of their tensors' sizes."""
    for attribute in layer.attributes:
        attribute.follow(units)
    for module in {part.module: None for part in layer.parts}:
        if isinstance(module, nn.Linear):
            module.out_features, module.in_features = _shape(module)
        elif isinstance(module, nn.Conv2d):
            if module.groups > 1:  # depth-wise: one filter per channel
                module.groups = module.in_channels = _shape(module)[0]
            else:
                module.in_channels = _shape(module)[1]
            module.out_channels = _shape(module)[0]
        elif isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.num_features = _shape(module)[0]
    if hasattr(layer.module, "attention_bias_cache"):  # of timm: biases of the former heads
        vars(layer.module)["attention_bias_cache"] = {}
    forward = layer.forward if units else layer.empty
    if forward is not None:
        layer.module.__class__ = slim_class(type(layer.module), forward)


def _shape(module: nn.Module) -> torch.Size:
    return Part(module, "weight", 0, 1, 1).tensor.shape

"""DIMAP as a method of ``torch.nn.utils.prune``."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn.utils import prune

from torch_dimap.masking.amounts import check_amount, count_to_prune
from torch_dimap.selection import check_finite, select
from torch_dimap.sharding import is_sharded

# The name that torch's global call gives to all of its tensors joined: the one thing by which
# a method can tell that call from the pruning of a single, flat tensor.
_GLOBAL = "temp"


class DimapUnstructured(prune.BasePruningMethod):
    """Prune the (currently unpruned) entries with the lowest DIMAP scores.

    In :func:`global_module_aware_unstructured` and :func:`dimap_unstructured`, and in
    ``DimapUnstructured.apply`` for one tensor of a module, the layers are known and this
    class needs nothing but the amount. In torch's own ``prune.global_unstructured`` all
    layers arrive as one flat tensor, and every layer has its own energy: ``sizes`` must
    tell where one ends and the next begins. Without it that call is refused, since
    inside what looks like a single layer DIMAP is plain magnitude.

    Args:
        amount: int, a number of entries, or float, the fraction of them in [0, 1].
        sizes: the number of entries of each layer, in order, that the tensor
            concatenates: ``numel()`` each, or on a repeated call, where torch passes
            unpruned entries only, ``int(weight_mask.sum())`` each. None: one layer.

    Raises:
        TypeError: if ``amount`` is neither int nor float.
        ValueError: if it is negative, NaN or a fraction above 1; later, if ``sizes``
            does not add up to the tensor, or is missing in ``prune.global_unstructured``.
    """

    PRUNING_TYPE = "unstructured"

    def __init__(self, amount: float, sizes: Iterable[int] | None = None) -> None:
        check_amount(amount, "DimapUnstructured(): amount")
        self.amount = amount
        self.sizes = None if sizes is None else [int(size) for size in sizes]

    def compute_mask(self, t: Tensor, default_mask: Tensor) -> Tensor:
        """Return ``default_mask`` with the lowest-scoring of its entries set to zero.

        Args:
            t: what to rank by, finite; the weights or scores in their place.
            default_mask: tensor of the shape of ``t``, 1 where an entry may go.
        """
        if is_sharded(t):
            raise ValueError(
                "DimapUnstructured.compute_mask(): t must be whole, found a part of a sharded "
                "tensor (a DTensor): call dimap_unstructured, which prunes those."
            )
        check_finite(t, "DimapUnstructured.compute_mask(): t")
        if self.sizes is None and t.dim() == 1 and vars(self).get("_tensor_name") == _GLOBAL:
            raise ValueError(
                "DimapUnstructured(): sizes must tell the layers apart that "
                "prune.global_unstructured joins to one tensor, found none: call "
                "torch_dimap.global_module_aware_unstructured(parameters, amount=...), which "
                "knows the layers, or pass sizes=[module.weight.numel(), ...]."
            )
        sizes = [t.numel()] if self.sizes is None else self.sizes
        if sum(sizes) != t.numel() or min(sizes, default=0) < 0:
            raise ValueError(
                f"DimapUnstructured(): sizes must add up to the {t.numel()} entries to rank, "
                f"found a sum of {sum(sizes)}: on a repeated call only unpruned entries count."
            )
        chooseable = default_mask.reshape(-1) != 0
        count = count_to_prune(
            self.amount, int(chooseable.count_nonzero()), "DimapUnstructured(): amount"
        )
        keep, _ = select(t.reshape(-1).split(sizes), count, chooseable.split(sizes))
        return torch.cat(keep).view(t.shape).to(default_mask.dtype)

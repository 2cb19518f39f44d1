"""The DIMAP importance score of one weight tensor, as the paper defines it."""

from __future__ import annotations

import torch
from torch import Tensor

from torch_dimap.sharding import is_sharded, layout_of, spread, whole_of

RANKABLE_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# Squares of magnitudes scaled to at most 1 can neither overflow nor lose their
# largest entries; beyond this exponent the scale itself would leave float64.
_MAX_EXPONENT = 1000


def unit_scale(largest: Tensor) -> Tensor:
    """Return the power of two (float64, 0-dim) that brings ``largest`` to about 1."""
    exponent = torch.frexp(largest.to(torch.float64)).exponent.to(torch.int64)
    # Written as bits: torch.ldexp overflows beyond float32's range in older releases.
    return ((1023 - exponent.clamp(-_MAX_EXPONENT, _MAX_EXPONENT)) << 52).view(torch.float64)


def dimap_scores(weight: Tensor) -> Tensor:
    r"""Score every entry of one layer's weight by its share of the layer's energy.

    With the entries ordered by magnitude, largest first, as
    :math:`p_1, p_2, \dots, p_n`, the score of the j-th is

    .. math:: W[p_j]^2 \,/\, (W[p_1]^2 + \dots + W[p_j]^2).

    The largest entry scores exactly 1, a zero scores 0, and inside the layer the
    scores are in the order of the magnitudes: they only decide how layers of
    different scale share a budget. Among equal magnitudes the entry that comes
    first in row-major order counts as the larger one.

    This is the definition, a full sort in float64. Pruning itself goes through
    :mod:`torch_dimap.selection`, which finds the same entries without scoring them.

    Args:
        weight: one layer's weight, any shape and strides, a floating-point dtype,
            finite. It is only read. A sharded one is gathered for it, so all processes
            must make the call; the scores are laid out as it is.

    Returns:
        The scores, float64, of the shape and on the device of ``weight``.

    Raises:
        TypeError: if ``weight`` is not a floating-point tensor.
        ValueError: if it is on the meta device, or holds NaN or infinity.

    Source: He and Zhou, "Data-independent Module-aware Pruning for Hierarchical
    Vision Transformers", ICLR 2024, Eq. 10.

    Example:
        >>> dimap_scores(torch.tensor([[2.0, -1.0], [0.0, 2.0]]))
        tensor([[1.0000, 0.1111],
                [0.0000, 0.5000]], dtype=torch.float64)
    """
    if is_sharded(weight):
        scores = dimap_scores(whole_of(weight))
        return spread(layout_of(weight, False, "dimap_scores(): weight").part_of(scores), weight)
    check_finite(weight, "dimap_scores(): weight")
    magnitude = weight.detach().reshape(-1).to(torch.float64).abs()
    if magnitude.numel() == 0:
        return torch.zeros(weight.shape, dtype=torch.float64, device=weight.device)
    order = torch.argsort(magnitude, descending=True, stable=True)
    square = (magnitude * unit_scale(magnitude.max()))[order].square()
    # On the CPU cumsum adds one by one from the largest entry down; a GPU's
    # parallel scan would round differently.
    energy = square.cpu().cumsum(0).to(square.device)
    scores = torch.zeros_like(magnitude)
    scores[order] = torch.where(square > 0, square / energy, 0.0)
    return scores.reshape(weight.shape)


def check_finite(tensor: Tensor, what: str) -> None:
    """Raise unless ``tensor`` is a real floating-point tensor without NaN or infinity."""
    check_rankable(tensor, what)
    # One read, and both ends carry a NaN or an infinity found anywhere between.
    if tensor.numel() and not torch.stack(torch.aminmax(tensor.detach())).isfinite().all():
        raise no_rank(what)


def check_rankable(tensor: Tensor, what: str) -> None:
    """Raise unless ``tensor`` is a real floating-point tensor with values, whichever they are."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{what} must be a tensor, found {type(tensor).__name__}.")
    if tensor.dtype not in RANKABLE_DTYPES:
        raise TypeError(
            f"{what} must be a float16, bfloat16, float32 or float64 tensor, "
            f"found {tensor.dtype}: convert it first."
        )
    if tensor.is_meta:
        raise ValueError(
            f"{what} is on the meta device and has no values to rank: load weights first."
        )


def no_rank(what: str) -> ValueError:
    """Return the error for values that are not finite."""
    return ValueError(
        f"{what} holds NaN or infinite values, which have no rank: "
        "look for the layer's origin (a diverged training, an overflow in half precision)."
    )

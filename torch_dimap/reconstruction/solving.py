"""The best values for the kept weights of one layer: masked least squares, all rows at once.

All rows of a layer see the same inputs X and so share H = X^T X, but every row keeps weights
of its own: an exact solution factorizes another piece of H for each row. Conjugate gradients
need but two products per step for all rows together, one with H and one with the inverse of
the whole of H (damped), which preconditions them so well that ten to thirty steps do.
"""

from __future__ import annotations

import torch
from torch import Tensor

# The solver stops once WINDOW steps together lower the sum of squares by less than this part
# of what is left of it, which leaves it within a thousandth of the exact solution's; an error
# that falls below FLOOR of what it was counts as none.
TOLERANCE = 1e-4
WINDOW = 3
FLOOR = 1e-10
_ROUNDS, _STEPS = 5, 500  # never met, but rounding must not make a loop endless


def solve_masked(
    moments: Tensor, gradient: Tensor, keep: Tensor, ridge: Tensor, error: float
) -> Tensor:
    """Find the change of the kept weights that brings a layer closest to its targets.

    Minimizes ``|E - X D^T|^2 + sum(ridge * D^2)`` over the matrices D with zeros where
    ``keep`` has them, for inputs X (n x d) and errors of the outputs E (n x r). The products
    are in float32 and run again from an exact residual in float64 until that finds nothing to
    do, so that what is left of a small error is small too.

    Args:
        moments: X^T X, float64, d x d.
        gradient: E^T X, float64, r x d.
        keep: which weights may change, boolean, r x d.
        ridge: the price of a squared change of each column's weights, float64, d.
        error: |E|^2.

    Returns:
        D, float64, r x d.
    """
    damped = moments + torch.diag(ridge)
    matrix, inverse = damped.float(), inverse_of(damped).float()
    change, product, floor = torch.zeros_like(gradient), torch.zeros_like(gradient), FLOOR * error
    for _ in range(_ROUNDS):
        left = max(floor, error - float((change * (2 * gradient - product)).sum()))
        residual = torch.where(keep, gradient - product, 0.0).float()
        step, gain = _conjugate_gradients(matrix, inverse, residual, keep, left, floor)
        change += step
        product = change @ damped
        if gain <= TOLERANCE * left:
            break
    worse = (change * (2 * gradient - product)).sum(1) < 0  # never met but by rounding
    return change.masked_fill_(worse[:, None], 0.0)


def _conjugate_gradients(
    matrix: Tensor, inverse: Tensor, residual: Tensor, keep: Tensor, left: float, floor: float
) -> tuple[Tensor, float]:
    """Return a change that lowers the sum of squares, and by how much."""
    change = torch.zeros_like(residual)
    ahead = (residual @ inverse).mul_(keep)
    direction = ahead.clone()
    slope = (residual * ahead).sum(1, keepdim=True)
    gains: list[float] = []
    for _ in range(_STEPS):
        product = (direction @ matrix).mul_(keep)
        curvature = (direction * product).sum(1, keepdim=True)
        length = torch.where(curvature > 0, slope / curvature, 0.0)  # 0: the row is done
        gains.append(float((length * slope).sum(dtype=torch.float64)))
        if sum(gains[-WINDOW:]) <= TOLERANCE * max(floor, left - sum(gains)):
            break
        change.addcmul_(length, direction)
        residual.addcmul_(length, product, value=-1)
        ahead = (residual @ inverse).mul_(keep)
        before, slope = slope, (residual * ahead).sum(1, keepdim=True)
        direction.mul_(torch.where(before > 0, slope / before, 0.0)).add_(ahead)
    return change, sum(gains)


def inverse_of(damped: Tensor) -> Tensor:
    """Invert a matrix that may be singular, well enough for a preconditioner."""
    size = damped.diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny)
    for jitter in (0.0, 1e-9, 1e-6):
        shifted = damped.clone()
        shifted.diagonal().add_(jitter * size)
        factor, failed = torch.linalg.cholesky_ex(shifted)
        if not failed:
            return torch.cholesky_inverse(factor)
    return torch.diag(1 / damped.diagonal().clamp_min(1e-6 * size))


def solve_exactly(moments: Tensor, gradient: Tensor, keep: Tensor, ridge: Tensor) -> Tensor:
    """Do what :func:`solve_masked` does row by row: the slow definition, for comparisons."""
    change = torch.zeros_like(gradient)
    damped = moments + torch.diag(ridge)
    for row, (target, kept) in enumerate(zip(gradient, keep)):
        change[row, kept] = torch.linalg.pinv(damped[kept][:, kept], hermitian=True) @ target[kept]
    return change

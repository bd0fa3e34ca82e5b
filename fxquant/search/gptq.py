"""Rounds weights so that later columns make up for the errors of earlier ones (GPTQ).

Optimal brain compression, column by column (arXiv 2210.17323): the error of a rounded column,
weighed by the inverse of ``H = E[x x^T]``, is taken out of the columns still to be rounded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# Columns whose errors are spread over the rest in one product.
_BLOCK = 128


class Moments:
    """First and second moments of rows ``x`` and ``y``, centred, batch by batch.

    They are sums over rows shifted by the mean of the first batch, so that float32 products keep
    their digits; the sums are float64.

    Args:
        columns: K, of ``x``.
        targets: N, of ``y``.
        device: of the rows.
    """

    def __init__(self, columns: int, targets: int, device: torch.device) -> None:
        self._count = 0
        self._shift: tuple[Tensor, Tensor] | None = None
        self._x = torch.zeros(columns, dtype=torch.float64, device=device)
        self._y = torch.zeros(targets, dtype=torch.float64, device=device)
        self._xx = torch.zeros(columns, columns, dtype=torch.float64, device=device)
        self._yx = torch.zeros(targets, columns, dtype=torch.float64, device=device)
        self._yy = torch.zeros(targets, dtype=torch.float64, device=device)

    def add(self, x: Tensor, y: Tensor) -> None:
        """Takes rows ``(n, K)`` and ``(n, N)``."""
        if self._shift is None:
            self._shift = x.mean(0), y.mean(0)
        x, y = x - self._shift[0], y - self._shift[1]
        self._count += len(x)
        self._x += x.sum(0)
        self._y += y.sum(0)
        self._xx += x.T @ x
        self._yx += y.T @ x
        self._yy += y.square().sum(0)

    @property
    def mean_x(self) -> Tensor:
        """``(K,)``, float64."""
        assert self._shift is not None
        return self._x / self._count + self._shift[0]

    @property
    def mean_y(self) -> Tensor:
        """``(N,)``, float64."""
        assert self._shift is not None
        return self._y / self._count + self._shift[1]

    @property
    def covariance(self) -> Tensor:
        """``E[(x - mean) (x - mean)^T]``, ``(K, K)``, float64."""
        mean = self._x / self._count
        return self._xx / self._count - mean.outer(mean)

    @property
    def cross(self) -> Tensor:
        """``E[(y - mean) (x - mean)^T]``, ``(N, K)``, float64."""
        return self._yx / self._count - (self._y / self._count).outer(self._x / self._count)

    @property
    def finite(self) -> bool:
        """Whether no sum has overflowed."""
        return all(bool(x.isfinite().all()) for x in (self._xx, self._yx, self._yy))

    def error(self, weight: Tensor) -> float:
        """``E|y - W x - b|^2`` with the best bias, of a weight ``(N, K)``."""
        weight = weight.double()
        spread = self._yy / self._count - (self._y / self._count).square()
        rest = ((weight @ self.covariance - 2 * self.cross) * weight).sum()
        return max(float(spread.sum() + rest), 0.0)


@dataclass(frozen=True)
class Rounded:
    """A rounded weight.

    Attributes:
        latent: ``(N, K)``; what each value was when it was rounded, so that the quantizer rounds it
            to ``values``.
        values: ``(N, K)``, on the quantizer's grid.
    """

    latent: Tensor
    values: Tensor


def round_weight(
    weight: Tensor, covariance: Tensor, quantize: Callable[[Tensor], Tensor], damping: float
) -> Rounded:
    """Rounds column after column, those of largest variance first.

    Args:
        weight: ``(N, K)``.
        covariance: of the rows that it multiplies, ``(K, K)``, positive semidefinite.
        quantize: moves values ``(N, n)``, columns of the weight, to the grid.
        damping: share of the mean variance that is added to every variance, which keeps columns of
            no variance and equal columns harmless.
    """
    order = covariance.diagonal().argsort(descending=True, stable=True)
    factor = _inverse_factor(covariance[order][:, order], damping)
    left = weight.double()[:, order]
    latent, values = torch.empty_like(left), torch.empty_like(left)
    for start in range(0, left.shape[1], _BLOCK):
        part = slice(start, min(start + _BLOCK, left.shape[1]))
        own, steps = left[:, part].clone(), factor[part, part]
        errors = torch.empty_like(own)
        for i in range(own.shape[1]):
            column = own[:, i].float()
            rounded = quantize(column.unsqueeze(1)).squeeze(1)
            latent[:, start + i], values[:, start + i] = column, rounded
            errors[:, i] = (own[:, i] - rounded) / steps[i, i]
            own[:, i + 1 :] -= errors[:, i : i + 1] * steps[i, i + 1 :]
        left[:, part.stop :] -= errors @ factor[part, part.stop :]
    back = order.argsort()
    return Rounded(latent[:, back].to(weight.dtype), values[:, back].to(weight.dtype))


def _inverse_factor(covariance: Tensor, damping: float) -> Tensor:
    """The upper Cholesky factor of the inverse of the damped covariance, ``(K, K)``."""
    inverse = torch.cholesky_inverse(damped_factor(covariance, damping))
    factor: Tensor = torch.linalg.cholesky(inverse, upper=True)
    return factor


def damped_factor(covariance: Tensor, damping: float) -> Tensor:
    """Lower Cholesky factor of ``covariance + damping * mean variance``, ``(K, K)``.

    The damping is raised tenfold until the sum is positive definite in float64.
    """
    mean = covariance.diagonal().mean().clamp(min=1e-30)
    identity = torch.eye(len(covariance), dtype=covariance.dtype, device=covariance.device)
    while True:
        factor: Tensor
        factor, failed = torch.linalg.cholesky_ex(covariance + damping * mean * identity)
        if not bool(failed):
            return factor
        damping = max(10 * damping, 1e-6)


def ridge_update(weight: Tensor, parts: list[Moments], whole: Moments) -> tuple[Tensor, float]:
    """The change of a weight that makes up for quantized inputs (arXiv 2407.06794, eq. 10).

    ``dW = C (G + lambda I)^-1`` with ``G`` the covariance of the quantized inputs and ``C`` that of
    the error of the outputs with them. Lambda is chosen by the error on images left out: where none
    lowers it, the weight stays.

    Args:
        weight: ``(N, K)``.
        parts: moments of disjoint parts of the images, at least two.
        whole: of all images.

    Returns:
        The new weight ``(N, K)``, float64, and the error left on images left out, as a share of
        that without the update.
    """
    own = weight.double()
    before = least = sum(part.error(own) for part in parts)
    folds = [
        (held_out, _equation(own, [part for part in parts if part is not held_out]))
        for held_out in parts
    ]
    best = None
    for share in (10.0, 1.0, 1e-1, 1e-2):
        error = sum(
            held_out.error(own + _solution(equation, share)) for held_out, equation in folds
        )
        if error >= least:
            break
        best, least = share, error
    if best is None:
        return own, 1.0
    return own + _solution(_equation(own, [whole]), best), least / before


def _equation(weight: Tensor, parts: list[Moments]) -> tuple[Tensor, Tensor]:
    """``G`` and ``C``, sums over parts."""
    covariance = sum((part.covariance for part in parts[1:]), parts[0].covariance)
    cross = sum((part.cross for part in parts[1:]), parts[0].cross)
    return covariance, cross - weight @ covariance


def _solution(equation: tuple[Tensor, Tensor], share: float) -> Tensor:
    """``dW``, lambda a share of the mean variance."""
    covariance, cross = equation
    return torch.cholesky_solve(cross.T, damped_factor(covariance, share)).T

"""Rounds weights so that later columns make up for the errors of earlier ones (GPTQ).

Optimal brain compression, column by column (arXiv 2210.17323): the error of a rounded column,
weighted by the inverse of ``H = E[x x^T]``, is subtracted from the columns still to be rounded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# Columns whose errors are subtracted from all later columns in one product.
_COLUMNS_PER_BLOCK = 128


class Moments:
    """First and second moments of rows ``x`` and ``y``, centred, accumulated batch by batch.

    The moments are sums over rows shifted by the mean of the first batch, so that float32 products
    keep their digits; the sums are float64.

    Args:
        columns: K, number of columns of ``x``.
        targets: N, number of columns of ``y``.
        device: device of the rows.
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
        """Adds rows ``x``, ``(n, K)``, and ``y``, ``(n, N)``, to the sums."""
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
        """Mean of ``x``, ``(K,)``, float64."""
        assert self._shift is not None
        return self._x / self._count + self._shift[0]

    @property
    def mean_y(self) -> Tensor:
        """Mean of ``y``, ``(N,)``, float64."""
        assert self._shift is not None
        return self._y / self._count + self._shift[1]

    @property
    def covariance(self) -> Tensor:
        """Covariance of ``x``, ``E[(x - mean) (x - mean)^T]``, ``(K, K)``, float64."""
        mean = self._x / self._count
        return self._xx / self._count - mean.outer(mean)

    @property
    def cross(self) -> Tensor:
        """Covariance of ``y`` with ``x``, ``E[(y - mean) (x - mean)^T]``, ``(N, K)``, float64."""
        return self._yx / self._count - (self._y / self._count).outer(self._x / self._count)

    @property
    def finite(self) -> bool:
        """Whether no sum has overflowed."""
        return all(bool(x.isfinite().all()) for x in (self._xx, self._yx, self._yy))

    def error(self, weight: Tensor) -> float:
        """Squared error ``E|y - W x - b|^2`` of a weight W, ``(N, K)``, with the best bias b."""
        weight = weight.double()
        variance = self._yy / self._count - (self._y / self._count).square()
        explained = ((weight @ self.covariance - 2 * self.cross) * weight).sum()
        return max(float(variance.sum() + explained), 0.0)


@dataclass(frozen=True)
class Rounded:
    """A rounded weight.

    Attributes:
        latent: each value as it was when it was rounded, ``(N, K)``; the quantizer rounds it to
            the entry of ``values``.
        values: the rounded weight, ``(N, K)``, on the quantizer's grid.
    """

    latent: Tensor
    values: Tensor


def round_weight(
    weight: Tensor, covariance: Tensor, quantize: Callable[[Tensor], Tensor], damping: float
) -> Rounded:
    """Rounds column after column, columns of largest variance first.

    Args:
        weight: the weight, ``(N, K)``.
        covariance: covariance of the rows that the weight multiplies, ``(K, K)``, positive
            semidefinite.
        quantize: rounds columns of the weight, ``(N, n)``, to the grid.
        damping: share of the mean variance that is added to every variance; with it the matrix can
            be inverted although columns have no variance or equal one another.
    """
    order = covariance.diagonal().argsort(descending=True, stable=True)
    factor = _inverse_factor(covariance[order][:, order], damping)
    residual = weight.double()[:, order]
    latent, values = torch.empty_like(residual), torch.empty_like(residual)
    for start in range(0, residual.shape[1], _COLUMNS_PER_BLOCK):
        block = slice(start, min(start + _COLUMNS_PER_BLOCK, residual.shape[1]))
        columns, block_factor = residual[:, block].clone(), factor[block, block]
        errors = torch.empty_like(columns)
        for i in range(columns.shape[1]):
            column = columns[:, i].float()
            rounded = quantize(column.unsqueeze(1)).squeeze(1)
            latent[:, start + i], values[:, start + i] = column, rounded
            errors[:, i] = (columns[:, i] - rounded) / block_factor[i, i]
            columns[:, i + 1 :] -= errors[:, i : i + 1] * block_factor[i, i + 1 :]
        residual[:, block.stop :] -= errors @ factor[block, block.stop :]
    inverse_order = order.argsort()
    return Rounded(
        latent[:, inverse_order].to(weight.dtype), values[:, inverse_order].to(weight.dtype)
    )


def _inverse_factor(covariance: Tensor, damping: float) -> Tensor:
    """Upper Cholesky factor of the inverse of the damped covariance, ``(K, K)``."""
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


def ridge_update(weight: Tensor, folds: list[Moments], whole: Moments) -> tuple[Tensor, float]:
    """Updates a weight so that it makes up for quantized inputs (arXiv 2407.06794, eq. 10).

    ``dW = C (G + lambda I)^-1`` with ``G`` the covariance of the quantized inputs and ``C`` the
    covariance of the output error with these inputs. Lambda is chosen by cross-validation, by the
    error on the images left out of each fit; where no lambda lowers that error, the weight stays.

    Args:
        weight: the weight, ``(N, K)``.
        folds: moments of disjoint subsets of the images, at least two.
        whole: moments of all images.

    Returns:
        The new weight ``(N, K)``, float64, and its error on the images left out, as a share of
        the error without the update.
    """
    weight = weight.double()
    before = least = sum(fold.error(weight) for fold in folds)
    splits = [
        (held_out, _equation(weight, [fold for fold in folds if fold is not held_out]))
        for held_out in folds
    ]
    best = None
    for share in (10.0, 1.0, 1e-1, 1e-2):
        error = sum(
            held_out.error(weight + _solution(equation, share)) for held_out, equation in splits
        )
        if error >= least:
            break
        best, least = share, error
    if best is None:
        return weight, 1.0
    return weight + _solution(_equation(weight, [whole]), best), least / before


def _equation(weight: Tensor, folds: list[Moments]) -> tuple[Tensor, Tensor]:
    """Matrices ``G`` and ``C`` of :func:`ridge_update`, summed over moments."""
    covariance = sum((fold.covariance for fold in folds[1:]), folds[0].covariance)
    cross = sum((fold.cross for fold in folds[1:]), folds[0].cross)
    return covariance, cross - weight @ covariance


def _solution(equation: tuple[Tensor, Tensor], share: float) -> Tensor:
    """Change ``dW`` of the weight, with lambda a share of the mean variance."""
    covariance, cross = equation
    return torch.cholesky_solve(cross.T, damped_factor(covariance, share)).T

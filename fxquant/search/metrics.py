"""Losses of quantized products against the float product, for many candidates at once.

Outputs have the shape ``(S, H, G, n, N)``: samples, heads (or groups of a convolution), candidates,
rows, columns. Each *unit* of a product gets a loss of its own. A unit is the part of the product
that one scale acts on alone: the whole product, a head, or a column.
"""

from __future__ import annotations

from enum import Enum

from torch import Tensor

from fxquant.config.scale_search import Metric


class Unit(Enum):
    """Part of a product that one scale acts on."""

    TENSOR = "tensor"
    HEAD = "head"
    COLUMN = "column"


def unit_shape(unit: Unit, heads: int, columns: int) -> tuple[int, ...]:
    """Shape of a tensor with one loss for each unit: ``()``, ``(H,)`` or ``(H, N)``."""
    return {Unit.TENSOR: (), Unit.HEAD: (heads,), Unit.COLUMN: (heads, columns)}[unit]


def losses(
    outputs: Tensor, target: Tensor, gradient: Tensor | None, metric: Metric, unit: Unit
) -> Tensor:
    """Losses of all candidates for each unit.

    - ``hessian``: ``sum (dL/dO)^2 (O^ - O)^2``, the diagonal of the Fisher information as the
      Hessian (arXiv 2111.12293, eq. 14).
    - ``fisher``: the same with the squared gradient of a column averaged over its rows, as if
      gradient and error were independent (K-FAC's assumption, arXiv 1503.05671).
    - ``mse``: ``sum (O^ - O)^2``;  ``l1``: ``sum |O^ - O|``.
    - ``cosine``: ``sum (1 - cos(O^, O))`` over the rows of the unit; for a column, ``1 - cos`` of
      the column itself.

    Args:
        outputs: quantized products, ``(S, H, G, n, N)``; overwritten.
        target: float product, ``(S, H, n, N)``.
        gradient: ``dL/dO``, shaped as target; read by ``hessian`` and ``fisher`` alone. ``fisher``
            also accepts its root mean square over rows, ``(1, H, 1, N)``.
        metric: the loss.
        unit: part of the product that gets a loss of its own.

    Returns:
        The losses, ``(G, *unit_shape)``.
    """
    target = target.unsqueeze(2)
    if metric is Metric.COSINE:
        return _cosine(outputs, target, unit)
    error = outputs.sub_(target)
    if metric is Metric.L1:
        columns = error.abs_().sum((0, 3))
    else:
        if metric is Metric.HESSIAN:
            assert gradient is not None
            error.mul_(gradient.unsqueeze(2))
        columns = error.square_().sum((0, 3))
        if metric is Metric.FISHER:
            assert gradient is not None
            columns *= gradient.square().mean((0, 2)).unsqueeze(1)  # (H, 1, N)
    return _by_unit(columns, unit)


def _by_unit(columns: Tensor, unit: Unit) -> Tensor:
    """Sums losses of columns, ``(H, G, N)``, to losses of units, ``(G, *unit_shape)``."""
    if unit is Unit.COLUMN:
        return columns.transpose(0, 1)
    heads = columns.sum(-1).t()
    return heads if unit is Unit.HEAD else heads.sum(1)


def _cosine(outputs: Tensor, target: Tensor, unit: Unit) -> Tensor:
    """Losses ``1 - cos``, as half the squared distance of unit vectors, which does not cancel."""
    axes = (0, 3) if unit is Unit.COLUMN else (4,)
    sizes = [x.square().sum(axes, keepdim=True).sqrt() for x in (outputs, target)]
    output_direction, target_direction = (
        x / size.clamp(min=1e-30) for x, size in zip((outputs, target), sizes, strict=True)
    )
    distance = output_direction.sub_(target_direction).square_().sum(axes, keepdim=True) / 2
    for size in sizes:
        distance += (size == 0) / 2  # at a right angle to all vectors
    return _by_unit(distance.sum((0, 3)), unit)

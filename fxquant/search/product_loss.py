"""Errors that candidate quantizers of one operand cause in the output of a product.

Every product has one form, ``(S, H, n, K) @ (S, H, K, N)``: a linear has one sample and
one head, a convolution one sample of patches and a head for each of its groups.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fxquant.config.scale_search import GRADIENT_METRICS, Metric
from fxquant.search.metrics import Unit, losses

# Elements of the largest temporary. Above 32 MB glibc asks the kernel for fresh pages each time,
# whose page faults cost as much as the product; far above the size of the caches the passes over
# the temporary cost as much.
_LARGEST_TEMPORARY = 1 << 21


@dataclass(frozen=True)
class ProductSample:
    """Sampled rows of a product of the float model.

    Attributes:
        lhs: left operand, ``(S, H, n, K)``.
        rhs: right operand, ``(S, H, K, N)``, or ``(1, H, K, N)`` for all samples.
        gradient: ``dL/dO``, ``(S, H, n, N)``, scaled by the root of ``counts``; None where it was
            not asked for or does not exist.
        counts: number of data rows that each row stands for, ``(n,)``, or, for an attention
            product, that each sample stands for, ``(S,)``; None where all counts are equal.
        channels: whether a column is the same channel in every row; in attention a column is
            another key in every sample.
    """

    lhs: Tensor
    rhs: Tensor
    gradient: Tensor | None
    counts: Tensor | None = None
    channels: bool = False

    def metric(self, requested: Metric) -> Metric:
        """The nearest metric to ``requested`` that the sample allows.

        Squared error where the sample has no gradient; ``hessian`` instead of ``fisher`` where
        columns mean different things in different rows, so that rows cannot be averaged.
        """
        if requested not in GRADIENT_METRICS:
            return requested
        if self.gradient is None:
            return Metric.MSE
        return requested if self.channels else Metric.HESSIAN

    @property
    def columns(self) -> int:
        """Number N of columns of the product."""
        return self.rhs.shape[-1]

    @property
    def heads(self) -> int:
        """Number H of heads, or of groups of a convolution."""
        return self.rhs.shape[1]


@dataclass(frozen=True)
class Consumer:
    """A product that reads the quantizer under search.

    Attributes:
        sample: sampled rows of the product.
        left: whether the quantizer is on the left operand.
        other: the other operand as it is quantized at present, shaped as in the sample.
    """

    sample: ProductSample
    left: bool
    other: Tensor

    @property
    def values(self) -> Tensor:
        """Float values of the operand whose quantizer is under search."""
        return self.sample.lhs if self.left else self.sample.rhs

    @property
    def candidate_axis(self) -> int:
        """Position of the candidates' axis among the axes of the quantized operand."""
        return 2 if self.left else 3


# Maps values of an operand, candidates ``(G, *units)`` and the position of a new axis to the
# quantized values, with the candidates along that axis.
Quantize = Callable[[Tensor, Tensor, int], Tensor]


def candidate_losses(
    consumers: list[Consumer], candidates: Tensor, quantize: Quantize, metric: Metric, unit: Unit
) -> Tensor:
    """Loss of each candidate, summed over the products that read the operand.

    Args:
        consumers: the products, at least one; where there are several, they have the same units.
        candidates: indices of candidates, ``(G, *units)``.
        quantize: quantizes an operand with candidates.
        metric: the loss, see :func:`losses`.
        unit: part of the product that has a candidate of its own.

    Returns:
        The losses, ``(G, *units)``.
    """
    total = torch.zeros(candidates.shape, device=candidates.device)
    for consumer in _with_gradients(consumers, metric):
        sample = consumer.sample
        target, sample_metric = sample.lhs @ sample.rhs, sample.metric(metric)
        gradient = sample.gradient
        if (
            sample_metric is Metric.FISHER and gradient is not None
        ):  # averaged once for all candidates
            gradient = gradient.square().mean((0, 2), keepdim=True).sqrt()
        size = max(consumer.values.numel(), target.numel(), 1)
        step = max(1, _LARGEST_TEMPORARY // size)
        for start in range(0, len(candidates), step):
            chunk = candidates[start : start + step]
            quantized = quantize(consumer.values, chunk, consumer.candidate_axis)
            outputs = _products(quantized, consumer, len(chunk))
            chunk_losses = losses(outputs, target, gradient, sample_metric, unit)
            total[start : start + step] += chunk_losses
    return total


def _with_gradients(consumers: list[Consumer], metric: Metric) -> list[Consumer]:
    """Consumers that the loss depends on, by a gradient; all where none has a gradient."""
    if metric not in GRADIENT_METRICS:
        return consumers
    return [c for c in consumers if c.sample.gradient is not None] or consumers


def _products(quantized: Tensor, consumer: Consumer, count: int) -> Tensor:
    """Products ``(S, H, G, n, N)``: candidates are more rows on the left, columns on the right."""
    if consumer.left:
        out = quantized.flatten(2, 3) @ consumer.other
        return torch.unflatten(out, 2, (count, -1))
    out = consumer.other @ quantized.flatten(3, 4)
    return torch.unflatten(out, 3, (count, -1)).movedim(3, 2)


def along_units(parameter: Tensor, unit: Unit, axis: int) -> Tensor:
    """Shapes a parameter ``(G, *units)`` to broadcast against an operand with G at ``axis``."""
    shape = [1] * 5
    shape[axis] = len(parameter)
    if unit is not Unit.TENSOR:
        shape[1] = parameter.shape[1]
    if unit is Unit.COLUMN:
        shape[4] = parameter.shape[2]
        # Stored as (G, H, N); the operand has G behind H.
        parameter = parameter.movedim(0, 1)
    elif unit is Unit.HEAD:
        parameter = parameter.movedim(0, 1)
    return parameter.reshape(shape)

"""The error that candidate quantizers of one operand make in the output of a product.

Every product is brought to one form, ``(S, H, n, K) @ (S, H, K, N)``: a linear has one sample and
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
# whose faults cost as much as the product; far above the caches the passes over it do.
_CHUNK = 1 << 21


@dataclass(frozen=True)
class ProductSample:
    """Rows of a product, from the float model.

    Attributes:
        lhs: ``(S, H, n, K)``.
        rhs: ``(S, H, K, N)``, or ``(1, H, K, N)`` for all samples.
        gradient: ``dL/dO``, ``(S, H, n, N)``; None where it was not asked for or does not exist.
            Scaled by the root of ``counts``.
        counts: how many rows of the data each row, or of an attention product each sample, stands
            for; ``(n,)`` or ``(S,)``; None where all are alike.
        channels: a column is the same channel in every row; in attention it is another key.
    """

    lhs: Tensor
    rhs: Tensor
    gradient: Tensor | None
    counts: Tensor | None = None
    channels: bool = False

    def metric(self, wanted: Metric) -> Metric:
        """The metric that can be had.

        Squared error where there is no gradient; and no average over rows whose columns mean
        different things.
        """
        if wanted not in GRADIENT_METRICS:
            return wanted
        if self.gradient is None:
            return Metric.MSE
        return wanted if self.channels else Metric.HESSIAN

    @property
    def columns(self) -> int:
        """N."""
        return self.rhs.shape[-1]

    @property
    def heads(self) -> int:
        """H."""
        return self.rhs.shape[1]


@dataclass(frozen=True)
class Consumer:
    """A product that reads the quantizer under search.

    Attributes:
        sample: rows of the product.
        left: the quantizer is on the left operand.
        other: the other operand as it is quantized now, shaped as in the sample.
    """

    sample: ProductSample
    left: bool
    other: Tensor

    @property
    def values(self) -> Tensor:
        """The operand itself."""
        return self.sample.lhs if self.left else self.sample.rhs

    @property
    def candidate_axis(self) -> int:
        """Where the candidates' axis stands among those of the operand."""
        return 2 if self.left else 3


# Values of an operand and candidates ``(G, *units)`` to the quantized values, the candidates
# along a new axis at the position given.
Quantize = Callable[[Tensor, Tensor, int], Tensor]


def candidate_losses(
    consumers: list[Consumer], candidates: Tensor, quantize: Quantize, metric: Metric, unit: Unit
) -> Tensor:
    """Loss of each candidate, summed over the products that read the operand.

    Args:
        consumers: at least one; where there are more, the units of all are the same.
        candidates: ``(G, *units)``.
        quantize: how a candidate quantizes.
        metric: see :func:`losses`.
        unit: what has a candidate of its own.

    Returns:
        ``(G, *units)``.
    """
    total = torch.zeros(candidates.shape, device=candidates.device)
    for consumer in _weighing(consumers, metric):
        sample = consumer.sample
        target, own = sample.lhs @ sample.rhs, sample.metric(metric)
        gradient = sample.gradient
        if own is Metric.FISHER and gradient is not None:  # averaged once for all candidates
            gradient = gradient.square().mean((0, 2), keepdim=True).sqrt()
        size = max(consumer.values.numel(), target.numel(), 1)
        step = max(1, _CHUNK // size)
        for start in range(0, len(candidates), step):
            part = candidates[start : start + step]
            tried = quantize(consumer.values, part, consumer.candidate_axis)
            outputs = _products(tried, consumer, len(part))
            found = losses(outputs, target, gradient, own, unit)
            total[start : start + step] += found
    return total


def _weighing(consumers: list[Consumer], metric: Metric) -> list[Consumer]:
    """Without those that the loss does not depend on, unless that is all."""
    if metric not in GRADIENT_METRICS:
        return consumers
    return [c for c in consumers if c.sample.gradient is not None] or consumers


def _products(tried: Tensor, consumer: Consumer, count: int) -> Tensor:
    """``(S, H, G, n, N)``: the candidates are more rows on the left, more columns on the right."""
    if consumer.left:
        out = tried.flatten(2, 3) @ consumer.other
        return torch.unflatten(out, 2, (count, -1))
    out = consumer.other @ tried.flatten(3, 4)
    return torch.unflatten(out, 3, (count, -1)).movedim(3, 2)


def along_units(parameter: Tensor, unit: Unit, axis: int) -> Tensor:
    """A parameter ``(G, *units)`` so that it broadcasts against an operand with G at ``axis``."""
    shape = [1] * 5
    shape[axis] = len(parameter)
    if unit is not Unit.TENSOR:
        shape[1] = parameter.shape[1]
    if unit is Unit.COLUMN:
        shape[4] = parameter.shape[2]
        # Stored (G, H, N), wanted with G behind H.
        parameter = parameter.movedim(0, 1)
    elif unit is Unit.HEAD:
        parameter = parameter.movedim(0, 1)
    return parameter.reshape(shape)

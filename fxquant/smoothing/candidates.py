"""Candidates of SQ-b: affine maps of channels for a lower output error (arXiv 2401.14895).

Activations are divided by ``eps_j = max|y_j - mu_j|^a / max_i|W_ij|^(1-a)`` (SmoothQuant's factor,
arXiv 2211.10438, eq. 4, of the shifted channel) and shifted by ``mu``, the mean of the channel or
the middle of its range (Outlier Suppression+, arXiv 2304.09145). For each shift, the finalists are
the ``a`` of least output error and the shift alone.

A finalist with a lower output error may still be worse for the network than no map: where channels
lie around zero and vary less than a step, rounding shrinks all of them, and these errors add up
over channels and tokens, while errors of channels that lie anywhere cancel. Therefore the loss of
the network decides among the finalists (:mod:`fxquant.smoothing.choose`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

from fxquant.config.scale_search import Metric
from fxquant.config.spec import TensorSpec
from fxquant.quantizers import Quantizer, uniform_class
from fxquant.search.metrics import Unit
from fxquant.search.product_loss import Consumer, ProductSample, candidate_losses
from fxquant.search.scales import stacked

# Exponents in twentieths: every other one first, then the two neighbours of the best. The error is
# not convex in the exponent; the least error of all 21 exponents is on average 0.7 % lower (a test
# has the measurement).
_COARSE, _NEIGHBOURS = range(0, 21, 2), (-1, 1)
# Clipped ranges as shares of the whole range: about as a search of scales would choose afterwards.
_CLIPPING_SHARES = (1.0, 0.85, 0.7, 0.55)


@dataclass(frozen=True)
class ConsumerSample:
    """Sampled rows of a product that reads the channels.

    Attributes:
        sample: rows of the product.
        spec: spec of the operand that holds the channels, of the uniform scheme.
        weight: spec of a linear's weight; None where the weight stays float, and in attention.
        left: whether the channels are the columns K of a linear's left operand; otherwise they are
            the columns of the right operand of an attention product, ``heads x N``.
    """

    sample: ProductSample
    spec: TensorSpec
    weight: TensorSpec | None
    left: bool


@dataclass(frozen=True)
class Smoothing:
    """A map ``(y - shift) / divide`` of channels.

    Attributes:
        divide: ``(C,)``, above zero.
        shift: ``(C,)``.
        name: description for the report.
    """

    divide: Tensor
    shift: Tensor
    name: str


def folded_sample(sample: ProductSample, smoothing: Smoothing, *, left: bool) -> ProductSample:
    """Rows of a product after a fold; its output differs by a constant alone.

    Args:
        sample: rows of a linear, whose input holds the channels, or of an attention product, whose
            right operand and output hold them.
        smoothing: the map.
        left: whether the product is a linear.
    """
    if left:
        lhs = (sample.lhs - smoothing.shift) / smoothing.divide
        return replace(sample, lhs=lhs, rhs=sample.rhs * smoothing.divide.unsqueeze(1))
    divide, shift = (x.view(sample.heads, 1, -1) for x in (smoothing.divide, smoothing.shift))
    gradient = None if sample.gradient is None else sample.gradient * divide
    return replace(sample, rhs=(sample.rhs - shift) / divide, gradient=gradient)


def finalists(
    consumers: list[ConsumerSample], metric: Metric, *, shiftable: bool
) -> list[Smoothing]:
    """The finalists: no change first, then the map of least output error of each kind.

    Args:
        consumers: all products that read the channels; at least one is a linear.
        metric: metric of the output error.
        shiftable: whether channels may be shifted.
    """
    values = torch.cat([_channels(consumer) for consumer in consumers])
    lo, hi = values.amin(0), values.amax(0)
    zeros, ones = torch.zeros_like(lo), torch.ones_like(lo)
    shifts = {"not shifted": zeros}
    if shiftable:
        shifts = {"shifted by the mean": values.mean(0), "shifted by the middle": (lo + hi) / 2}
    maps = [Smoothing(ones, zeros, "as it is")]
    for name, shift in shifts.items():
        maps.append(
            _best_scaled(consumers, name, shift, torch.maximum(hi - shift, shift - lo), metric)
        )
        if shiftable:
            maps.append(Smoothing(ones, shift, name))
    return maps


def _best_scaled(
    consumers: list[ConsumerSample], name: str, shift: Tensor, peak: Tensor, metric: Metric
) -> Smoothing:
    """The map of least output error over exponents; ``peak`` are the largest absolute values."""

    @cache
    def at(twentieths: int) -> Smoothing:
        exponent = twentieths / 20
        return Smoothing(_factors(consumers, peak, exponent), shift, f"{name}, a = {exponent:g}")

    @cache
    def error(twentieths: int) -> float:
        return TrialFold(consumers, at(twentieths), metric).error

    best = min(_COARSE, key=error)
    near = (best + step for step in _NEIGHBOURS if 0 <= best + step <= 20)
    return at(min((best, *near), key=error))


def _channels(consumer: ConsumerSample) -> Tensor:
    """Sampled values of the channels, ``(n, C)``."""
    if consumer.left:
        return consumer.sample.lhs[0, 0]
    return consumer.sample.rhs.transpose(1, 2).flatten(2).flatten(0, 1)


def _factors(consumers: list[ConsumerSample], peak: Tensor, exponent: float) -> Tensor:
    """The factors ``eps``, ``(C,)``, scaled to a geometric mean of 1."""
    weights = torch.cat([r.sample.rhs[0, 0] for r in consumers if r.left], dim=1)
    largest = weights.abs().amax(1)
    # Channels that do not vary, or that weights ignore, have nothing to smooth.
    live = (peak > 1e-6 * peak.max()) & (largest > 1e-6 * largest.max())
    logs = exponent * peak.clamp(min=1e-30).log()
    logs -= (1 - exponent) * largest.clamp(min=1e-30).log()
    return torch.where(live, logs - logs[live].mean(), 0.0).exp()


class TrialFold:
    """A map of channels on trial, with quantizers about as a search would choose them.

    Args:
        consumers: all products that read the channels, before the fold.
        smoothing: the map.
        metric: metric of the output error.

    Attributes:
        error: output error of all products, in the metric.
        overrides: for each consumer, a function that computes its product as after the fold, from
            the arguments of the product.
    """

    def __init__(
        self, consumers: list[ConsumerSample], smoothing: Smoothing, metric: Metric
    ) -> None:
        folded = [
            replace(c, sample=folded_sample(c.sample, smoothing, left=c.left)) for c in consumers
        ]
        linears = [consumer for consumer in folded if consumer.left]
        weights = [_quantized_weight(consumer) for consumer in linears]
        shared, self.error = _input_quantizer(linears, weights, metric)
        self.overrides: list[Callable[..., Tensor]] = []
        for consumer in folded:
            if consumer.left:
                self.overrides.append(_linear(smoothing, shared, weights.pop(0)[0, 0].t()))
            else:
                quantizer, error = _value_quantizer(consumer, metric)
                self.overrides.append(_attention(smoothing, quantizer, consumer.sample.heads))
                self.error += error


def _quantized_weight(consumer: ConsumerSample) -> Tensor:
    """Weight of a linear, ``(1, 1, K, N)``, quantized with the best clipping of each column."""
    weight, spec = consumer.sample.rhs, consumer.weight
    if spec is None:
        return weight
    rows = weight[0, 0].t()
    energy = consumer.sample.lhs[0, 0].square().mean(0)
    best, least = rows, torch.full((len(rows),), torch.inf, device=rows.device)
    for share in _CLIPPING_SHARES:
        lo, hi = rows.amin(1) * share, rows.amax(1) * share
        quantized = uniform_class(spec).from_range(lo, hi, spec, 0)(rows)
        error = ((quantized - rows).square() * energy).sum(1)
        best = torch.where((error < least).unsqueeze(1), quantized, best)
        least = torch.minimum(error, least)
    return best.t()[None, None]


def _input_quantizer(
    linears: list[ConsumerSample], weights: list[Tensor], metric: Metric
) -> tuple[Quantizer, float]:
    """The quantizer of the input that all linears share, and their output error with it."""
    ends = [consumer.sample.lhs.aminmax() for consumer in linears]
    lo, hi = torch.stack([e.min for e in ends]).min(), torch.stack([e.max for e in ends]).max()
    spec = linears[0].spec
    trials = [uniform_class(spec).from_range(lo * s, hi * s, spec, None) for s in _CLIPPING_SHARES]
    operands = [Consumer(r.sample, True, w) for r, w in zip(linears, weights, strict=True)]
    index = torch.arange(len(trials), device=lo.device)
    error = candidate_losses(operands, index, stacked(trials), metric, Unit.TENSOR)
    return trials[int(error.argmin())], float(error.min())


def _value_quantizer(consumer: ConsumerSample, metric: Metric) -> tuple[Quantizer, float]:
    """The quantizer of attention values, with a scale per head, and the output error with it."""
    values, spec = consumer.sample.rhs, consumer.spec
    lo, hi = values.amin((0, 2, 3)), values.amax((0, 2, 3))
    trials = [uniform_class(spec).from_range(lo * s, hi * s, spec, -3) for s in _CLIPPING_SHARES]
    index = torch.arange(len(trials), device=lo.device).unsqueeze(1).expand(-1, len(lo))
    operand = Consumer(consumer.sample, False, consumer.sample.lhs)

    def quantize(values: Tensor, candidates: Tensor, axis: int) -> Tensor:
        return stacked(trials)(values, candidates[:, 0], axis)

    error = candidate_losses([operand], index, quantize, metric, Unit.HEAD)
    share = torch.tensor(_CLIPPING_SHARES, device=lo.device)[error.argmin(0)]
    best = uniform_class(spec).from_range(lo * share, hi * share, spec, -3)
    return best, float(error.min(0).values.sum())


def _linear(smoothing: Smoothing, quantizer: Quantizer, weight: Tensor) -> Callable[..., Tensor]:
    def compute(x: Tensor, exact: Tensor, bias: Tensor | None = None) -> Tensor:
        quantized = quantizer((x - smoothing.shift) / smoothing.divide)
        return functional.linear(quantized, weight, bias) + exact @ smoothing.shift

    return compute


def _attention(smoothing: Smoothing, quantizer: Quantizer, heads: int) -> Callable[..., Tensor]:
    divide, shift = (x.view(heads, 1, -1) for x in (smoothing.divide, smoothing.shift))

    def compute(shares: Tensor, values: Tensor) -> Tensor:
        quantized = quantizer((values - shift) / divide)
        product: Tensor = shares @ (quantized * divide + shift)
        return product

    return compute

"""SQ-b: which affine maps of channels let products be quantized best (arXiv 2401.14895).

Activations are divided by ``eps_j = max|y_j - mu_j|^a / max_i|W_ij|^(1-a)`` (SmoothQuant's factor,
arXiv 2211.10438, eq. 4, of the shifted channel) and shifted by ``mu``, the mean of the channel or
the middle of its range (Outlier Suppression+, arXiv 2304.09145). For each shift the ``a`` of least
output error is a finalist, and so is the shift alone.

A finalist may be worse than nothing although its output error is less: where channels lie around
zero and vary less than a step, rounding shrinks all of them, and such errors add up over channels
and tokens, where those of channels that lie anywhere cancel. So the choice among finalists is left
to the network's own output.
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

# Exponents in twentieths: every other one, then the two beside the best.
_COARSE, _AROUND = range(0, 21, 2), (-1, 1)
# Of the whole range: what clipping a search would choose afterwards, roughly.
_SHARES = (1.0, 0.85, 0.7, 0.55)


@dataclass(frozen=True)
class ConsumerSample:
    """A product that reads the channels.

    Attributes:
        sample: its rows.
        spec: of the operand that holds the channels, quantized uniformly.
        weight: of the weight of a linear; None where it stays float, and in attention.
        left: the channels are the columns K of a linear's left operand; otherwise those of the
            right operand of an attention product, ``heads x N``.
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
        name: what it is, in words.
    """

    divide: Tensor
    shift: Tensor
    name: str


def folded_sample(sample: ProductSample, smoothing: Smoothing, *, left: bool) -> ProductSample:
    """A product after its channels folded_sample; what it gives is the same but for a constant.

    Args:
        sample: of a linear, the channels being those of its input, or of an attention product,
            whose right operand and output hold them.
        smoothing: the map.
        left: of a linear.
    """
    if left:
        lhs = (sample.lhs - smoothing.shift) / smoothing.divide
        return replace(sample, lhs=lhs, rhs=sample.rhs * smoothing.divide.unsqueeze(1))
    divide, shift = (x.view(sample.heads, 1, -1) for x in (smoothing.divide, smoothing.shift))
    gradient = None if sample.gradient is None else sample.gradient * divide
    return replace(sample, rhs=(sample.rhs - shift) / divide, gradient=gradient)


def finalists(
    readings: list[ConsumerSample], metric: Metric, *, shiftable: bool
) -> list[Smoothing]:
    """No change, and for each kind of map the one of least output error.

    Args:
        readings: all that reads the channels; at least one linear.
        metric: of the output error.
        shiftable: whether channels may be shifted.
    """
    values = torch.cat([_channels(reading) for reading in readings])
    lo, hi = values.amin(0), values.amax(0)
    zeros, ones = torch.zeros_like(lo), torch.ones_like(lo)
    shifts = {"not shifted": zeros}
    if shiftable:
        shifts = {"shifted by the mean": values.mean(0), "shifted by the middle": (lo + hi) / 2}
    found = [Smoothing(ones, zeros, "as it is")]
    for name, shift in shifts.items():
        found.append(
            _best_scaled(readings, name, shift, torch.maximum(hi - shift, shift - lo), metric)
        )
        if shiftable:
            found.append(Smoothing(ones, shift, name))
    return found


def _best_scaled(
    readings: list[ConsumerSample], name: str, shift: Tensor, peak: Tensor, metric: Metric
) -> Smoothing:
    """The exponent of least output error, for channels of largest absolute values ``peak``."""

    @cache
    def at(twentieths: int) -> Smoothing:
        exponent = twentieths / 20
        return Smoothing(_factors(readings, peak, exponent), shift, f"{name}, a = {exponent:g}")

    @cache
    def error(twentieths: int) -> float:
        return TrialFold(readings, at(twentieths), metric).error

    best = min(_COARSE, key=error)
    near = (best + step for step in _AROUND if 0 <= best + step <= 20)
    return at(min((best, *near), key=error))


def _channels(reading: ConsumerSample) -> Tensor:
    """Values ``(n, C)``."""
    if reading.left:
        return reading.sample.lhs[0, 0]
    return reading.sample.rhs.transpose(1, 2).flatten(2).flatten(0, 1)


def _factors(readings: list[ConsumerSample], peak: Tensor, exponent: float) -> Tensor:
    """``eps``, its geometric mean 1."""
    weights = torch.cat([r.sample.rhs[0, 0] for r in readings if r.left], dim=1)
    largest = weights.abs().amax(1)
    # Channels that do not vary, or that no one reads, have nothing to smooth.
    live = (peak > 1e-6 * peak.max()) & (largest > 1e-6 * largest.max())
    logs = exponent * peak.clamp(min=1e-30).log()
    logs -= (1 - exponent) * largest.clamp(min=1e-30).log()
    return torch.where(live, logs - logs[live].mean(), 0.0).exp()


class TrialFold:
    """Quantizers for a map of channels, roughly as a search would choose them.

    Args:
        readings: all that reads the channels, not yet folded_sample.
        smoothing: the map.
        metric: of the output error.

    Attributes:
        error: of all products, in the metric.
        instead: for each reading what computes its product, from the arguments of the call.
    """

    def __init__(
        self, readings: list[ConsumerSample], smoothing: Smoothing, metric: Metric
    ) -> None:
        here = [
            replace(r, sample=folded_sample(r.sample, smoothing, left=r.left)) for r in readings
        ]
        linears = [reading for reading in here if reading.left]
        weights = [_quantized_weight(reading) for reading in linears]
        shared, self.error = _input_quantizer(linears, weights, metric)
        self.instead: list[Callable[..., Tensor]] = []
        for reading in here:
            if reading.left:
                self.instead.append(_linear(smoothing, shared, weights.pop(0)[0, 0].t()))
            else:
                quantizer, error = _value_quantizer(reading, metric)
                self.instead.append(_attention(smoothing, quantizer, reading.sample.heads))
                self.error += error


def _quantized_weight(reading: ConsumerSample) -> Tensor:
    """The right operand of a linear, ``(1, 1, K, N)``, each column clipped where it is best."""
    weight, spec = reading.sample.rhs, reading.weight
    if spec is None:
        return weight
    rows = weight[0, 0].t()
    energy = reading.sample.lhs[0, 0].square().mean(0)
    best, least = rows, torch.full((len(rows),), torch.inf, device=rows.device)
    for share in _SHARES:
        lo, hi = rows.amin(1) * share, rows.amax(1) * share
        tried = uniform_class(spec).from_range(lo, hi, spec, 0)(rows)
        error = ((tried - rows).square() * energy).sum(1)
        best = torch.where((error < least).unsqueeze(1), tried, best)
        least = torch.minimum(error, least)
    return best.t()[None, None]


def _input_quantizer(
    linears: list[ConsumerSample], weights: list[Tensor], metric: Metric
) -> tuple[Quantizer, float]:
    """One quantizer for what all linears read, and their error with it."""
    ends = [reading.sample.lhs.aminmax() for reading in linears]
    lo, hi = torch.stack([e.min for e in ends]).min(), torch.stack([e.max for e in ends]).max()
    spec = linears[0].spec
    tried = [uniform_class(spec).from_range(lo * s, hi * s, spec, None) for s in _SHARES]
    operands = [Consumer(r.sample, True, w) for r, w in zip(linears, weights, strict=True)]
    index = torch.arange(len(tried), device=lo.device)
    error = candidate_losses(operands, index, stacked(tried), metric, Unit.TENSOR)
    return tried[int(error.argmin())], float(error.min())


def _value_quantizer(reading: ConsumerSample, metric: Metric) -> tuple[Quantizer, float]:
    """The quantizer of attention values, a scale a head, and the error of the product with it."""
    values = reading.sample.rhs
    lo, hi = values.amin((0, 2, 3)), values.amax((0, 2, 3))
    kind = uniform_class(reading.spec)
    tried = [kind.from_range(lo * s, hi * s, reading.spec, -3) for s in _SHARES]
    index = torch.arange(len(tried), device=lo.device).unsqueeze(1).expand(-1, len(lo))
    operand = Consumer(reading.sample, False, reading.sample.lhs)

    def quantize(values: Tensor, candidates: Tensor, axis: int) -> Tensor:
        return stacked(tried)(values, candidates[:, 0], axis)

    error = candidate_losses([operand], index, quantize, metric, Unit.HEAD)
    share = torch.tensor(_SHARES, device=lo.device)[error.argmin(0)]
    best = kind.from_range(lo * share, hi * share, reading.spec, -3)
    return best, float(error.min(0).values.sum())


def _linear(smoothing: Smoothing, quantizer: Quantizer, weight: Tensor) -> Callable[..., Tensor]:
    def compute(x: Tensor, exact: Tensor, bias: Tensor | None = None) -> Tensor:
        read = quantizer((x - smoothing.shift) / smoothing.divide)
        return functional.linear(read, weight, bias) + exact @ smoothing.shift

    return compute


def _attention(smoothing: Smoothing, quantizer: Quantizer, heads: int) -> Callable[..., Tensor]:
    divide, shift = (x.view(heads, 1, -1) for x in (smoothing.divide, smoothing.shift))

    def compute(shares: Tensor, values: Tensor) -> Tensor:
        read = quantizer((values - shift) / divide)
        product: Tensor = shares @ (read * divide + shift)
        return product

    return compute

"""Observers: record streaming statistics of a tensor and fit a quantizer to them.

The number of scales bounds an observer's memory; the number of images does not matter.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fxquant.config.spec import ObserverKind, TensorSpec
from fxquant.errors import CalibrationError, NonFiniteError
from fxquant.observers.ranges import GRID, bin_centres, mse_range, percentile_range
from fxquant.quantizers import FAMILIES, Quantizer, has_uniform_grid

# Bins of a histogram: a power of two, so that a doubled range merges whole pairs of bins.
BINS = 4096
# A softmax maps values this far below the largest of their row to shares below exp(-12).
_SOFTMAX_DEPTH = 12.0
# Percentile that the percentile observer keeps where the spec names none.
_DEFAULT_PERCENTILE = 99.99


class Observer(nn.Module, ABC):
    """Records statistics of the tensors that pass through and fits a quantizer to them.

    Args:
        spec: spec of the quantizer to fit.
        axis: axis of the observed tensor whose entries get a scale each; None for per tensor.
        where: edge name, for messages.
    """

    def __init__(self, spec: TensorSpec, *, axis: int | None, where: str) -> None:
        super().__init__()
        self.spec, self.axis, self.where = spec, axis, where
        self.lo: Tensor | None = None
        self.hi: Tensor | None = None

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """Records ``x`` and returns it unchanged.

        Raises:
            NonFiniteError: ``x`` holds NaN or infinity.
        """
        if x.numel():
            rows = self._rows(x.detach())
            self._update_range(rows)
            self._record(rows)
        return x

    def range(self) -> tuple[Tensor, Tensor]:
        """Smallest and largest observed value, each ``(C,)``, with C = 1 for per tensor.

        Raises:
            CalibrationError: no value was observed.
        """
        if self.lo is None or self.hi is None:
            raise CalibrationError(
                f"{self.where}: no calibration data reached this edge; it lies on a path that "
                "the calibration images do not take. Keep it float with a rule (spec: null)",
                edge=self.where,
            )
        return self.lo, self.hi

    def fit(self, spec: TensorSpec | None = None) -> Quantizer:
        """Fits a quantizer to the observed values.

        Args:
            spec: replaces the observer's spec, by one of another width or with another fit.
        """
        spec = spec or self.spec
        lo, hi = self._fit_range(spec)
        if self.axis is None:
            lo, hi = lo.reshape(()), hi.reshape(())
        if spec.scheme.limits.is_one_sided:
            self._check_one_sided(spec)
        return self._fit(lo, hi, spec)

    def _fit(self, lo: Tensor, hi: Tensor, spec: TensorSpec) -> Quantizer:
        """Fits the quantizer that covers ``[lo, hi]``."""
        return FAMILIES[spec.scheme].fit(lo, hi, spec, self.axis)

    def _check_one_sided(self, spec: TensorSpec) -> None:
        """Raises CalibrationError where a value is negative, for which the scheme has no code."""
        least = float(self.range()[0].min())
        if least < 0:
            raise CalibrationError(
                f"{self.where}: scheme {spec.scheme} is for values from zero up, such as outputs "
                f"of softmax, got {least:.3g}; add `fed_by: softmax` to the rule, or use scheme "
                "uniform",
                edge=self.where,
                got=least,
                expected=">= 0",
            )

    def _rows(self, x: Tensor) -> Tensor:
        """Values of ``x`` as ``(C, n)``, one row for each scale."""
        if self.axis is None:
            return x.reshape(1, -1)
        return x.movedim(self.axis, 0).reshape(x.shape[self.axis], -1)

    def _update_range(self, rows: Tensor) -> None:
        lo, hi = torch.aminmax(rows.float(), dim=1)
        if not bool(torch.isfinite(lo).all() & torch.isfinite(hi).all()):
            below = bool((lo == -torch.inf).any()) and not bool((hi.isnan() | hi.isposinf()).any())
            mask = (
                ". Minus infinity, which attention masks are made of, has no integer code: mask "
                "with a finite number, such as -1e4, or leave its additions and the "
                "softmax float by rules `op: add` and `op: softmax` with `spec: null`"
            )
            raise NonFiniteError(
                f"{self.where}: NaN or infinity during calibration. The float model itself "
                "produces it for these images: check its weights and the image normalisation"
                f"{mask if below else ''}",
                edge=self.where,
            )
        self.lo = lo if self.lo is None else torch.minimum(self.lo, lo)
        self.hi = hi if self.hi is None else torch.maximum(self.hi, hi)

    @abstractmethod
    def _record(self, rows: Tensor) -> None:
        """Records one batch, ``(C, n)``."""

    @abstractmethod
    def _fit_range(self, spec: TensorSpec) -> tuple[Tensor, Tensor]:
        """Fits the lower and the upper end of the range to cover, ``(C,)`` each."""


class MinMaxObserver(Observer):
    """Fits the range from the smallest to the largest observed value."""

    def _record(self, rows: Tensor) -> None:
        pass

    def _fit_range(self, spec: TensorSpec) -> tuple[Tensor, Tensor]:
        assert spec.observer is ObserverKind.MINMAX, (
            "a fit by percentile or squared error needs a histogram"
        )
        return self.range()


class SoftmaxObserver(MinMaxObserver):
    """Covers values less than 12 below the largest value of their row, the last axis.

    The softmax maps a value further down to a share below ``exp(-12)``, 6e-6. In a row with an
    attention mask of -100, most of the range would otherwise be spent on values that the softmax
    maps to zero.
    """

    def __init__(self, spec: TensorSpec, *, axis: int | None, where: str) -> None:
        super().__init__(spec, axis=axis, where=where)
        self.peak: Tensor | None = None

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """Records ``x`` and the smallest among the largest values of its rows."""
        if x.numel():
            peak = x.detach().float().amax(-1).amin()
            self.peak = peak if self.peak is None else torch.minimum(self.peak, peak)
        return super().forward(x)

    def _fit_range(self, spec: TensorSpec) -> tuple[Tensor, Tensor]:
        lo, hi = self.range()
        assert self.peak is not None
        return torch.maximum(lo, self.peak - _SOFTMAX_DEPTH), hi


class HistogramObserver(Observer):
    """Records one histogram for each scale, over a range that doubles as larger values arrive.

    Adding neighbours turns the bins of ``[-R, R)`` into the middle half of ``[-2R, 2R)``, so that
    the result depends on the data alone, not on its order or its division into batches.
    """

    def __init__(self, spec: TensorSpec, *, axis: int | None, where: str) -> None:
        super().__init__(spec, axis=axis, where=where)
        self.counts: Tensor | None = None
        self.limit: Tensor | None = None

    def _record(self, rows: Tensor) -> None:
        peak = rows.abs().amax(dim=1).float()
        # The smallest power of two above the peak, so that doubling is exact and the peak falls
        # inside the half-open last bin; never so large that float32 overflows.
        exponent = torch.frexp(peak.clamp(min=1e-30))[1].clamp(max=127)
        needed = torch.ldexp(torch.ones_like(peak), exponent)
        if self.counts is None or self.limit is None:
            self.counts = torch.zeros(rows.shape[0], BINS, dtype=torch.float64, device=rows.device)
            self.limit = needed
        while bool((grow := self.limit < needed).any()):
            self.counts[grow] = _halve_resolution(self.counts[grow])
            self.limit = torch.where(grow, self.limit * 2, self.limit)
        self.counts += _count(rows, self.limit)

    def _fit_range(self, spec: TensorSpec) -> tuple[Tensor, Tensor]:
        lo, hi = self.range()
        assert self.counts is not None and self.limit is not None
        if spec.observer is ObserverKind.PERCENTILE:
            share = _DEFAULT_PERCENTILE if spec.percentile is None else spec.percentile
            return percentile_range(self.counts, self.limit, lo, hi, share)
        if spec.observer is ObserverKind.MINMAX or not has_uniform_grid(spec):
            return lo, hi
        return mse_range(self.counts, self.limit, lo, hi, spec)

    def _fit(self, lo: Tensor, hi: Tensor, spec: TensorSpec) -> Quantizer:
        """Fits the candidate of least squared error, or the range for specs of other fits."""
        candidates = FAMILIES[spec.scheme].candidates
        if candidates is None or spec.observer is not ObserverKind.MSE or lo.ndim:
            return super()._fit(lo, hi, spec)
        rows = candidates(float(lo), float(hi), spec, GRID)
        return self.best([quantizer.to(lo.device) for row in rows for quantizer in row])

    def best(self, candidates: Sequence[Quantizer]) -> Quantizer:
        """The candidate, one for the whole tensor, of least squared error on the histogram."""
        assert self.counts is not None and self.limit is not None
        lo, hi = (end.reshape(1) for end in self.range())
        centres = bin_centres(self.counts, self.limit, lo, hi)[0]
        return least_error(centres, self.counts[0], candidates)


def _halve_resolution(counts: Tensor) -> Tensor:
    """Counts of bins twice as wide, over twice the range."""
    quarter = BINS // 4
    merged = counts.reshape(-1, BINS // 2, 2).sum(-1)
    return torch.nn.functional.pad(merged, (quarter, quarter))


def _count(rows: Tensor, limit: Tensor) -> Tensor:
    """Histogram of each row over ``[-limit, limit)``, ``(C, BINS)``."""
    width = (limit / (BINS // 2)).unsqueeze(1)
    counts = []
    # A row at a time keeps the index tensor as small as one head or channel.
    for row, step in zip(rows, width, strict=True):
        index = torch.floor(row.float() / step).add_(BINS // 2).clamp_(0, BINS - 1)
        counts.append(torch.bincount(index.to(torch.int64), minlength=BINS))
    return torch.stack(counts).to(torch.float64)


def make_observer(
    spec: TensorSpec, *, axis: int | None, where: str, histogram: bool = False
) -> Observer:
    """Makes the observer that ``spec.observer`` names.

    Args:
        spec: spec of the quantizer to fit.
        axis: axis of the observed tensor whose entries get a scale each; None for per tensor.
        where: edge name, for messages.
        histogram: record a histogram in any case, so that :meth:`Observer.fit` accepts any spec;
            except for the input of a softmax, whose range does not depend on the width.
    """
    if spec.observer is ObserverKind.MINMAX and not histogram:
        return MinMaxObserver(spec, axis=axis, where=where)
    if spec.observer is ObserverKind.SOFTMAX:
        return SoftmaxObserver(spec, axis=axis, where=where)
    return HistogramObserver(spec, axis=axis, where=where)


def least_error(values: Tensor, counts: Tensor, candidates: Sequence[Quantizer]) -> Quantizer:
    """The candidate of least squared error on a histogram.

    Args:
        values: centres of the bins, ``(bins,)``.
        counts: number of values in each bin, ``(bins,)``.
        candidates: quantizers, at least one.
    """
    counts = counts.to(values.dtype)
    errors = [
        float(((q.to(values.device)(values) - values).square() * counts).sum()) for q in candidates
    ]
    return candidates[errors.index(min(errors))]

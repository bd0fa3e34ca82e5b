"""Ranges from histograms: percentile clipping and the search for least squared error.

A histogram is ``counts`` of shape ``(C, bins)`` over ``[-limit, limit)`` with ``limit`` of shape
``(C,)``. All results are ``(C,)``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fxquant.config.spec import TensorSpec
from fxquant.quantizers import uniform_class

# Shares of the full range that are candidates for each end of a range.
GRID = tuple(0.02 * i for i in range(10, 51))
# Elements of the largest temporary: 64 MB as float32.
_LARGEST_TEMPORARY = 1 << 24


def _edges(counts: Tensor, limit: Tensor) -> Tensor:
    """Left edges of the bins and the right edge of the last, ``(C, bins + 1)``."""
    bins = counts.shape[1]
    unit = torch.linspace(-1, 1, bins + 1, dtype=counts.dtype, device=counts.device)
    return unit * limit.to(counts.dtype).unsqueeze(1)


def bin_centres(counts: Tensor, limit: Tensor, lo: Tensor, hi: Tensor) -> Tensor:
    """Centre of each bin, ``(C, bins)``, which stands for the bin's values.

    The outermost values are known exactly: a centre outside ``[lo, hi]`` is moved to the nearer end
    of that range.
    """
    edges = _edges(counts, limit)
    centres = ((edges[:, :-1] + edges[:, 1:]) / 2).float()
    return torch.minimum(torch.maximum(centres, lo.unsqueeze(1)), hi.unsqueeze(1))


def percentile_range(
    counts: Tensor, limit: Tensor, lo: Tensor, hi: Tensor, percentile: float
) -> tuple[Tensor, Tensor]:
    """Range with ``(100 - percentile)`` percent of the values cut off, half at each end.

    Args:
        counts: number of values in each bin, ``(C, bins)``.
        limit: end of the histogram's range, ``(C,)``.
        lo: smallest observed value, ``(C,)``.
        hi: largest observed value, ``(C,)``.
        percentile: in (50, 100].
    """
    share = counts.cumsum(1) / counts.sum(1, keepdim=True)
    tail = (100 - percentile) / 200
    edges = _edges(counts, limit)
    first = (share > tail).to(torch.int8).argmax(1, keepdim=True)
    last = (share >= 1 - tail).to(torch.int8).argmax(1, keepdim=True)
    low = edges.gather(1, first).squeeze(1).float()
    high = edges.gather(1, last + 1).squeeze(1).float()
    return torch.maximum(low, lo), torch.minimum(high, hi)


def mse_range(
    counts: Tensor, limit: Tensor, lo: Tensor, hi: Tensor, spec: TensorSpec
) -> tuple[Tensor, Tensor]:
    """Range whose quantizer has the least mean squared error on the histogram.

    Both ends shrink on a grid, first together, then each alone. The full range is always among
    the candidates, so that the result is never worse than min-max on the histogram.

    Args:
        counts: number of values in each bin, ``(C, bins)``.
        limit: end of the histogram's range, ``(C,)``.
        lo: smallest observed value, ``(C,)``.
        hi: largest observed value, ``(C,)``.
        spec: bit-width and symmetry of the quantizer.
    """
    # In units of the limit, a power of two: squared errors then neither overflow nor vanish.
    lo, hi = lo / limit, hi / limit
    centres = bin_centres(counts, torch.ones_like(limit), lo, hi)
    weights = counts.float()
    rows = max(1, _LARGEST_TEMPORARY // (len(GRID) * counts.shape[1]))
    ranges = [
        _shrink(
            centres[i : i + rows], weights[i : i + rows], lo[i : i + rows], hi[i : i + rows], spec
        )
        for i in range(0, len(lo), rows)
    ]
    low, high = (torch.cat(ends) for ends in zip(*ranges, strict=True))
    return low * limit, high * limit


def value_range(values: Tensor, spec: TensorSpec) -> tuple[Tensor, Tensor]:
    """Range whose quantizer has the least mean squared error on the values themselves.

    The search is that of :func:`mse_range`, over few values instead of a histogram.

    Args:
        values: one row for each scale, ``(C, n)``.
        spec: bit-width and symmetry of the quantizer.
    """
    rows = max(1, _LARGEST_TEMPORARY // (len(GRID) * values.shape[1]))
    ranges = [
        _shrink(chunk, torch.ones((), device=chunk.device), *torch.aminmax(chunk, dim=1), spec)
        for chunk in torch.split(values, rows)
    ]
    low, high = (torch.cat(ends) for ends in zip(*ranges, strict=True))
    return low, high


def _shrink(
    centres: Tensor, weights: Tensor, lo: Tensor, hi: Tensor, spec: TensorSpec
) -> tuple[Tensor, Tensor]:
    """Searches the ranges of as many rows as the memory budget allows."""
    # Candidates run along a new first axis: (G, C).
    shares = torch.tensor(GRID, device=lo.device).unsqueeze(1)
    # The scale of a symmetric grid depends on the longer end alone.
    alone = () if spec.symmetric else ((True, False), (False, True))
    for shrink_lo, shrink_hi in ((True, True), *alone):
        lows = lo * shares if shrink_lo else lo.expand(len(GRID), -1)
        highs = hi * shares if shrink_hi else hi.expand(len(GRID), -1)
        best = _error(centres, weights, lows, highs, spec).argmin(0, keepdim=True)
        lo, hi = lows.gather(0, best).squeeze(0), highs.gather(0, best).squeeze(0)
    return lo, hi


def _error(centres: Tensor, weights: Tensor, lo: Tensor, hi: Tensor, spec: TensorSpec) -> Tensor:
    """Squared error of each candidate range.

    Centres and weights have shape ``(C, bins)``; lo, hi and the result have shape ``(G, C)``.
    """
    scale, zero_point = uniform_class(spec).affine_parameters(lo, hi, spec)
    qmin, qmax = spec.code_range
    step, zero = scale.unsqueeze(-1), zero_point.unsqueeze(-1)
    codes = (centres / step).round_().add_(zero).clamp_(qmin, qmax)
    error = codes.sub_(zero).mul_(step).sub_(centres).square_()
    return error.mul_(weights).sum(-1)

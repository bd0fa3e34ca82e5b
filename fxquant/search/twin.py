"""Candidates of the twin uniform quantizer, and the choice among them on a histogram."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from fxquant.quantizers import Quantizer, TwinUniformQuantizer, covering_shift
from fxquant.spec import MAX_SHIFT, TensorSpec

Q = TypeVar("Q", bound=Quantizer)
# Shifts beyond the one that just covers the negative values: each halves what is covered of them.
_BEYOND = 2


def twin_candidates(
    lo: float, hi: float, spec: TensorSpec, fractions: Iterable[float]
) -> list[TwinUniformQuantizer]:
    """Twin quantizers for values in ``[lo, hi]``.

    One-sided: for each fraction of the coarse step that reaches ``hi``, every shift. For values
    up to 1 also the paper's own coarse step for softmax, ``1 / 2^(bits-1)``. Two-sided: for each
    fraction the shift whose fine region just covers ``lo``.

    Args:
        lo: smallest value.
        hi: largest value.
        spec: bit-width and bound of the shift.
        fractions: of the largest coarse step.
    """
    full = _full_step(lo, hi, spec)
    steps = [full * fraction for fraction in fractions]
    if lo < 0:
        return [
            _twin(step, covering_shift(step, -lo, spec), spec, two_sided=True) for step in steps
        ]
    if hi <= 1:
        steps.append(1 / (1 << (spec.bits - 1)))
    return [
        _twin(step, shift, spec, two_sided=False)
        for step in steps
        for shift in range(1, _largest_shift(spec) + 1)
    ]


def ratio_candidates(
    lo: float, hi: float, spec: TensorSpec, fractions: Sequence[float], *, two_sided: bool
) -> list[TwinUniformQuantizer]:
    """Twin quantizers for values in ``[lo, hi]``: every shift with every fraction (OPT-m).

    Two-sided ones up to a few shifts beyond that which just covers ``lo``.

    Args:
        lo: smallest value.
        hi: largest value.
        spec: bit-width and bound of the shift.
        fractions: of the largest coarse step.
        two_sided: kind of the quantizers.

    Returns:
        All fractions with the least shift first.
    """
    full, largest = _full_step(lo, hi, spec), _largest_shift(spec)
    if two_sided:
        covered = max(-lo, full / 2**MAX_SHIFT)
        largest = min(largest, covering_shift(full, covered, spec) + _BEYOND)
    return [
        _twin(full * fraction, shift, spec, two_sided=two_sided)
        for shift in range(0 if two_sided else 1, largest + 1)
        for fraction in fractions
    ]


def _full_step(lo: float, hi: float, spec: TensorSpec) -> float:
    """The coarse step whose regions reach both ends."""
    levels = 1 << (spec.bits - 1)
    return max(hi / (levels - 1), -lo / levels) or 1.0


def _largest_shift(spec: TensorSpec) -> int:
    return MAX_SHIFT if spec.max_shift is None else spec.max_shift


def _twin(coarse: float, shift: int, spec: TensorSpec, *, two_sided: bool) -> TwinUniformQuantizer:
    scale = torch.tensor(coarse / 2**shift, dtype=torch.float32)
    return TwinUniformQuantizer(scale, shift=shift, bits=spec.bits, two_sided=two_sided)


def least_error(values: Tensor, counts: Tensor, candidates: Sequence[Q]) -> Q:
    """The candidate of least squared error on a histogram.

    Args:
        values: centres of the bins, ``(bins,)``.
        counts: how many values each stands for, ``(bins,)``.
        candidates: at least one.
    """
    counts = counts.to(values.dtype)
    errors = [
        float(((q.to(values.device)(values) - values).square() * counts).sum()) for q in candidates
    ]
    return candidates[errors.index(min(errors))]

"""Candidates of the twin uniform quantizer, and the choice among them on a histogram."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from fxquant.quantizers import Quantizer, TwinUniformQuantizer, covering_shift
from fxquant.spec import MAX_SHIFT, TensorSpec

Q = TypeVar("Q", bound=Quantizer)


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
    levels = 1 << (spec.bits - 1)
    if lo < 0:
        full = max(hi / (levels - 1), -lo / levels)
        steps = [full * fraction for fraction in fractions]
        return [
            _twin(step, covering_shift(step, -lo, spec), spec, two_sided=True) for step in steps
        ]
    full = hi / (levels - 1) or 1.0
    steps = [full * fraction for fraction in fractions]
    if hi <= 1:
        steps.append(1 / levels)
    largest = MAX_SHIFT if spec.max_shift is None else spec.max_shift
    return [
        _twin(step, shift, spec, two_sided=False)
        for step in steps
        for shift in range(1, largest + 1)
    ]


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

"""Candidate quantizers for a range of values, by family, for fits on histograms and scale searches.

Candidates come in rows: a row for each choice of a discrete parameter, in it one for each share of
the range.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fractions import Fraction

import torch

from fxquant.config.spec import MAX_SHIFT, TensorSpec
from fxquant.quantizers.dynamic_focusing import DynamicFocusingQuantizer, largest_start
from fxquant.quantizers.log import LogQuantizer
from fxquant.quantizers.twin_uniform import TwinUniformQuantizer, covering_shift

# Shifts beyond the one that just covers the negative values: each halves what is covered of them.
_BEYOND = 2
# Octaves from one code of AdaLog to the next, n / d. From 16 to 2 codes for each halving, and half
# a code: with fewer bits codes must reach further. Tables have 16 entries at most.
ADALOG_OCTAVES = tuple(
    Fraction(n, d)
    for n, d in [
        *((1, 16), (1, 8), (1, 6), (1, 4), (1, 3), (1, 2)),
        *((2, 3), (3, 4), (1, 1), (3, 2), (2, 1)),
    ]
)


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


def focusing_candidates(
    top: float, spec: TensorSpec, shares: Sequence[float]
) -> list[list[DynamicFocusingQuantizer]]:
    """Dynamic focusing quantizers for values in ``[0, top]``.

    Args:
        top: largest value.
        spec: bit-width.
        shares: upper ends of the interval, as shares of ``top``.

    Returns:
        A row for each start of the interval.
    """
    ends = [top * share for share in shares]
    return [
        [DynamicFocusingQuantizer.reaching(end, start, spec.bits) for end in ends]
        for start in _starts(spec.bits)
    ]


def log_candidates(
    top: float, spec: TensorSpec, shares: Sequence[float], octaves: Iterable[Fraction]
) -> list[list[LogQuantizer]]:
    """Logarithmic quantizers for values in ``[0, top]``.

    Args:
        top: largest value.
        spec: bit-width.
        shares: largest values of the quantizer, as shares of ``top``.
        octaves: from one code to the next.

    Returns:
        A row for each of the octaves.
    """
    ends = [top * share for share in shares]
    return [
        [LogQuantizer.reaching(end, spec.bits, step.numerator, step.denominator) for end in ends]
        for step in octaves
    ]


def _starts(bits: int) -> list[int]:
    """Starts of the interval in steps, each half more than the last, as far as they go."""
    starts, start = [0], 1
    while start <= largest_start(bits):
        starts.append(start)
        start = max(start + 1, start * 3 // 2)
    return starts

"""Candidate quantizers of each family, for fits on histograms and for scale searches.

Candidates form rows: a row for each choice of a discrete parameter, and in the row one candidate
for each share of the range of values.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fractions import Fraction

import torch

from fxquant.config.spec import MAX_SHIFT, TensorSpec
from fxquant.quantizers.dynamic_focusing import DynamicFocusingQuantizer, largest_start
from fxquant.quantizers.log import LogQuantizer
from fxquant.quantizers.twin_uniform import TwinUniformQuantizer, covering_shift

# Shifts beyond the shift that just covers the negative values: each halves the covered range.
_SHIFTS_BEYOND_COVERING = 2
# Octaves n / d between neighbouring codes of AdaLog: from 16 codes for each halving of the value to
# half a code, since with fewer bits each code must span more. Tables have 16 entries at most.
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
    """Candidate twin quantizers for values in ``[lo, hi]``.

    One-sided: every shift with each fraction of the coarse step that reaches ``hi``; for values
    up to 1 also with the paper's coarse step for softmax, ``1 / 2^(bits-1)``. Two-sided: for each
    fraction the shift whose fine region just covers ``lo``.

    Args:
        lo: smallest value.
        hi: largest value.
        spec: bit-width and bound of the shift.
        fractions: coarse steps, as fractions of the largest.
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
    """Candidate twin quantizers of OPT-m for values in ``[lo, hi]``: all shifts and fractions.

    Shifts of two-sided quantizers end two beyond the shift that just covers ``lo``.

    Args:
        lo: smallest value.
        hi: largest value.
        spec: bit-width and bound of the shift.
        fractions: coarse steps, as fractions of the largest.
        two_sided: whether the quantizers are two-sided.

    Returns:
        The candidates: all fractions with the least shift first, then with the next shift.
    """
    full, largest = _full_step(lo, hi, spec), _largest_shift(spec)
    if two_sided:
        covered_magnitude = max(-lo, full / 2**MAX_SHIFT)
        largest = min(
            largest, covering_shift(full, covered_magnitude, spec) + _SHIFTS_BEYOND_COVERING
        )
    return [
        _twin(full * fraction, shift, spec, two_sided=two_sided)
        for shift in range(0 if two_sided else 1, largest + 1)
        for fraction in fractions
    ]


def _full_step(lo: float, hi: float, spec: TensorSpec) -> float:
    """The coarse step with which the regions reach both ends of the range."""
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
    """Candidate dynamic focusing quantizers for values in ``[0, top]``.

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
    """Candidate logarithmic quantizers for values in ``[0, top]``.

    Args:
        top: largest value.
        spec: bit-width.
        shares: largest values of the quantizer, as shares of ``top``.
        octaves: distances between neighbouring codes, in octaves.

    Returns:
        A row for each distance.
    """
    ends = [top * share for share in shares]
    return [
        [
            LogQuantizer.reaching(end, spec.bits, distance.numerator, distance.denominator)
            for end in ends
        ]
        for distance in octaves
    ]


def _starts(bits: int) -> list[int]:
    """Starts of the interval in steps, each about 1.5 times the last, up to the largest start."""
    starts, start = [0], 1
    while start <= largest_start(bits):
        starts.append(start)
        start = max(start + 1, start * 3 // 2)
    return starts

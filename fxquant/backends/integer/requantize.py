"""Requantization from accumulators to codes without a float: a whole factor and a right shift.

    code = clamp(round(acc * factor / 2^shift) + zero_point)    factor / 2^shift ~ s_acc / s_code

Products with the factor are int64 and cannot overflow, by the bound of the accumulators. Rounding
is half to even, as in the simulation.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from fxquant.errors import LoweringError
from fxquant.quantizers import TwinUniformQuantizer
from fxquant.quantizers.ops import broadcast, twin_threshold

# Bits of a factor: as many as the accumulators leave room for, up to the first number; where that
# would be less than the second, accumulators lose bits instead.
_MOST_FACTOR_BITS, _LEAST_FACTOR_BITS = 31, 24
# Products and sums below 2^62 leave room for the half that rounding adds.
WORD_BITS = 62
# Largest change of a code, in steps, that dropped bits of an accumulator may cause.
_DROPPED_BITS_TOLERANCE = 2.0**-8


class Multiplier(NamedTuple):
    """Ratio in integers, ``factor / 2^(drop + shift)``.

    Attributes:
        factor: whole factor, int64, ``()`` or ``(C,)``.
        shift: right shift of the product, int64, shaped as factor, 1 to 62.
        drop: number of bits that accumulators lose first, so that the product fits 64 bits; mostly
            zero.
    """

    factor: Tensor
    shift: Tensor
    drop: int


def multiplier(ratio: Tensor, bound: int) -> Multiplier:
    """Whole factors and right shifts for ratios, with a relative error of at most ``2^-24``.

    Args:
        ratio: float64, ``()`` or ``(C,)``, of any sign.
        bound: largest possible magnitude of an accumulator.

    Raises:
        LoweringError: the accumulators are so large, or a ratio so large or infinite, that a
            product with the factor exceeds int64.
    """
    bits = min(_MOST_FACTOR_BITS, WORD_BITS - bound.bit_length())
    drop = max(_LEAST_FACTOR_BITS - bits, 0)
    bits += drop
    mantissa, exponent = torch.frexp(torch.ldexp(ratio, torch.tensor(drop)))
    shift = bits - exponent.to(torch.int64)
    dropped_steps = float(ratio.abs().max()) * 2.0 ** (drop - 1) if drop else 0.0
    fits = bool(torch.isfinite(ratio).all()) and bool((shift >= 1).all())
    if not fits or dropped_steps > _DROPPED_BITS_TOLERANCE or bound.bit_length() > WORD_BITS:
        raise LoweringError(
            f"accumulators up to {bound} times {float(ratio.abs().max()):.3g} pass 64 bits; use "
            "fewer bits for the operands, or a scale that fits the values",
            got=bound,
        )
    # With a shift beyond 62 bits the result is less than a step, whatever the factor.
    excess = (shift - WORD_BITS).clamp(min=0)
    factor = torch.round(torch.ldexp(mantissa, bits - excess)).to(torch.int64)
    return Multiplier(factor, shift - excess, drop)


def rescale(acc: Tensor, ratio: Multiplier) -> Tensor:
    """Computes ``round(acc * factor / 2^shift)`` in int64, ties to even.

    The lowest ``drop`` bits of the accumulators are rounded off first.

    Args:
        acc: accumulators, integers.
        ratio: ratio whose factor and shift broadcast against ``acc``.
    """
    acc = acc.to(torch.int64)
    if ratio.drop:
        acc = (acc + (1 << (ratio.drop - 1))) >> ratio.drop
    product = acc * ratio.factor
    # Adding half less one, and one more where the floor is odd, rounds a tie up to an even number
    # or keeps it at one.
    odd = torch.bitwise_and(product >> ratio.shift, 1)
    half = torch.ones_like(ratio.shift) << (ratio.shift - 1)
    return (product + (half - 1) + odd) >> ratio.shift


class _Rescale(nn.Module):
    """Module that multiplies accumulators by a ratio, with factor and shift as buffers."""

    factor: Tensor
    shift: Tensor

    def __init__(self, ratio: Tensor, axis: int | None, bound: int) -> None:
        super().__init__()
        self.axis = axis
        integers = multiplier(ratio, bound)
        self.drop = integers.drop
        self.register_buffer("factor", integers.factor)
        self.register_buffer("shift", integers.shift)

    def forward(self, acc: Tensor) -> Tensor:
        """Converts accumulators to the new unit, int64."""
        factor, shift = (broadcast(x, acc.ndim, self.axis) for x in (self.factor, self.shift))
        return rescale(acc, Multiplier(factor, shift, self.drop))


class Requantize(nn.Module):
    """Requantizes accumulators to the codes of an affine quantizer.

    Args:
        ratio: unit of the accumulators over the scale of the codes, float64, ``()`` or ``(C,)``.
        zero_point: zero point of the codes, whole numbers, ``()`` or ``(C,)``.
        axis: axis of the accumulators that ratio or zero_point runs along; None per tensor.
        bound: largest possible magnitude of an accumulator.
        ends: smallest and largest code.
        dtype: type of the codes.
    """

    zero_point: Tensor

    def __init__(
        self,
        ratio: Tensor,
        zero_point: Tensor,
        *,
        axis: int | None,
        bound: int,
        ends: tuple[int, int],
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.scaled = _Rescale(ratio, axis if ratio.ndim else None, bound)
        self.axis = axis if zero_point.ndim else None
        self.ends, self.dtype = ends, dtype
        self.register_buffer("zero_point", zero_point.to(torch.int64))

    def forward(self, acc: Tensor) -> Tensor:
        """Codes of the values that the accumulators ``acc`` represent."""
        codes: Tensor = self.scaled(acc) + broadcast(self.zero_point, acc.ndim, self.axis)
        return codes.clamp(*self.ends).to(self.dtype)

    def extra_repr(self) -> str:
        """Range and type of the codes."""
        return f"{self.ends[0]}..{self.ends[1]}, {self.dtype}"


class TwinRequantize(nn.Module):
    """Requantizes accumulators to code words of a twin quantizer (arXiv 2111.12293, section 4.2).

    Args:
        quantizer: the twin quantizer.
        ratio: unit of the accumulators over the quantizer's fine scale, float64, positive, ``()``
            or ``(C,)``.
        axis: axis of the accumulators that the ratio runs along; None per tensor.
        bound: largest possible magnitude of an accumulator.

    Raises:
        LoweringError: a ratio is not positive.
    """

    threshold: Tensor

    def __init__(
        self, quantizer: TwinUniformQuantizer, ratio: Tensor, *, axis: int | None, bound: int
    ) -> None:
        super().__init__()
        if not bool((ratio > 0).all()):
            raise LoweringError(
                "a factor before a twin quantizer is not positive", got=ratio, expected="> 0"
            )
        self.levels, self.two_sided = quantizer.levels, quantizer.two_sided
        self.axis = axis
        self.fine = _Rescale(ratio, axis, bound)
        self.coarse = _Rescale(torch.ldexp(ratio, torch.tensor(-quantizer.shift)), axis, bound)
        steps = 0.0 if self.two_sided else twin_threshold(quantizer.shift, quantizer.bits)
        # Accumulators are above the border where they exceed the largest whole number below it.
        border = torch.floor(steps / ratio).clamp(max=2.0**WORD_BITS)
        self.register_buffer("threshold", border.to(torch.int64))

    def forward(self, acc: Tensor) -> Tensor:
        """Code words of the values that the accumulators ``acc`` represent."""
        top = self.levels - 1
        fine = self.fine(acc).clamp(-top if self.two_sided else 0, 0 if self.two_sided else top)
        coarse = self.coarse(acc).clamp(0, top)
        word = torch.where(coarse > 0, coarse + self.levels, 0)
        region = acc > broadcast(self.threshold, acc.ndim, self.axis)
        return torch.where(region, word, fine.abs()).to(torch.uint8)

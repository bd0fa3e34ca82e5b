"""From accumulators to codes without a float: a whole multiplier and a right shift.

    code = clamp(round(acc * factor / 2^shift) + zero_point)    factor / 2^shift ~ s_acc / s_code

Products with the factor are int64 and cannot overflow, by the bound of the accumulators. Ties are
rounded to even, as the simulation rounds them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from fxquant.errors import LoweringError
from fxquant.quantizers import TwinUniformQuantizer
from fxquant.quantizers.ops import broadcast, twin_threshold

# Bits of a factor where the accumulators leave room for them, and where they do not.
_FACTOR_BITS, _LEAST_BITS = 31, 24
# Products and sums below 2^62 leave room for the half that rounding adds.
WORD_BITS = 62
# What dropped bits of an accumulator may move a code by, in steps.
_TOLERANCE = 2.0**-8


class Multiplier(NamedTuple):
    """A ratio in integers: ``factor / 2^(drop + shift)``.

    Attributes:
        factor: int64, ``()`` or ``(C,)``.
        shift: int64 like factor, 1 to 62.
        drop: bits that accumulators lose first, so that the product fits 64 bits; mostly none.
    """

    factor: Tensor
    shift: Tensor
    drop: int


def multiplier(ratio: Tensor, bound: int) -> Multiplier:
    """Whole factors and right shifts that stand for ratios, within ``2^-24`` of them relatively.

    Args:
        ratio: float64, ``()`` or ``(C,)``, of any sign.
        bound: no accumulator is larger in magnitude.

    Raises:
        LoweringError: the accumulators are so large, or a ratio so large or infinite, that a
            product with the factor passes int64.
    """
    bits = min(_FACTOR_BITS, WORD_BITS - bound.bit_length())
    drop = max(_LEAST_BITS - bits, 0)
    bits += drop
    mantissa, exponent = torch.frexp(torch.ldexp(ratio, torch.tensor(drop)))
    shift = bits - exponent.to(torch.int64)
    lost = float(ratio.abs().max()) * 2.0 ** (drop - 1) if drop else 0.0
    fits = bool(torch.isfinite(ratio).all()) and bool((shift >= 1).all())
    if not fits or lost > _TOLERANCE or bound.bit_length() > WORD_BITS:
        raise LoweringError(
            f"accumulators up to {bound} times {float(ratio.abs().max()):.3g} pass 64 bits; use "
            "fewer bits for the operands, or a scale that fits the values"
        )
    # Beyond 62 bits the result is less than a step, whatever the factor.
    excess = (shift - WORD_BITS).clamp(min=0)
    factor = torch.round(torch.ldexp(mantissa, bits - excess)).to(torch.int64)
    return Multiplier(factor, shift - excess, drop)


def rescale(acc: Tensor, by: Multiplier) -> Tensor:
    """``round(acc * factor / 2^shift)`` in int64, ties to even, once ``drop`` bits are rounded off.

    Args:
        acc: integers.
        by: factor and shift broadcast against ``acc``.
    """
    acc = acc.to(torch.int64)
    if by.drop:
        acc = (acc + (1 << (by.drop - 1))) >> by.drop
    product = acc * by.factor
    # Half less one, and one more where the floor is odd: a tie goes up to even or stays there.
    odd = torch.bitwise_and(product >> by.shift, 1)
    half = torch.ones_like(by.shift) << (by.shift - 1)
    return (product + (half - 1) + odd) >> by.shift


class _Rescale(nn.Module):
    """The factor and shift of one ratio, as buffers."""

    factor: Tensor
    shift: Tensor

    def __init__(self, ratio: Tensor, axis: int | None, bound: int) -> None:
        super().__init__()
        self.axis = axis
        by = multiplier(ratio, bound)
        self.drop = by.drop
        self.register_buffer("factor", by.factor)
        self.register_buffer("shift", by.shift)

    def forward(self, acc: Tensor) -> Tensor:
        """``acc`` in the new unit, int64."""
        factor, shift = (broadcast(x, acc.ndim, self.axis) for x in (self.factor, self.shift))
        return rescale(acc, Multiplier(factor, shift, self.drop))


class Requantize(nn.Module):
    """Accumulators to the codes of a uniform quantizer.

    Args:
        ratio: unit of the accumulators over the scale of the codes, float64, ``()`` or ``(C,)``.
        zero_point: of the codes, whole numbers, ``()`` or ``(C,)``.
        axis: axis of the accumulators that either runs along; None per tensor.
        bound: no accumulator is larger in magnitude.
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
        """Codes of the values that ``acc`` stand for."""
        codes: Tensor = self.scaled(acc) + broadcast(self.zero_point, acc.ndim, self.axis)
        return codes.clamp(*self.ends).to(self.dtype)

    def extra_repr(self) -> str:
        """Range and type of the codes."""
        return f"{self.ends[0]}..{self.ends[1]}, {self.dtype}"


class TwinRequantize(nn.Module):
    """Accumulators to the code words of a twin quantizer (arXiv 2111.12293, section 4.2).

    Args:
        quantizer: the twin quantizer.
        ratio: unit of the accumulators over its fine scale, float64, positive, ``()`` or ``(C,)``.
        axis: axis of the accumulators that the ratio runs along; None per tensor.
        bound: no accumulator is larger in magnitude.

    Raises:
        LoweringError: a ratio is not positive.
    """

    threshold: Tensor

    def __init__(
        self, quantizer: TwinUniformQuantizer, ratio: Tensor, *, axis: int | None, bound: int
    ) -> None:
        super().__init__()
        if not bool((ratio > 0).all()):
            raise LoweringError("a factor that is not positive stands before a twin quantizer")
        self.levels, self.two_sided = quantizer.levels, quantizer.two_sided
        self.axis = axis
        self.fine = _Rescale(ratio, axis, bound)
        self.coarse = _Rescale(torch.ldexp(ratio, torch.tensor(-quantizer.shift)), axis, bound)
        steps = 0.0 if self.two_sided else twin_threshold(quantizer.shift, quantizer.bits)
        # Above the largest whole number of units that lies below the border.
        border = torch.floor(steps / ratio).clamp(max=2.0**WORD_BITS)
        self.register_buffer("threshold", border.to(torch.int64))

    def forward(self, acc: Tensor) -> Tensor:
        """Code words of the values that ``acc`` stand for."""
        top = self.levels - 1
        fine = self.fine(acc).clamp(-top if self.two_sided else 0, 0 if self.two_sided else top)
        coarse = self.coarse(acc).clamp(0, top)
        word = torch.where(coarse > 0, coarse + self.levels, 0)
        region = acc > broadcast(self.threshold, acc.ndim, self.axis)
        return torch.where(region, word, fine.abs()).to(torch.uint8)

"""Modules for functions, sums and means of integer codes, and for dequantized outputs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fxquant.backends.integer.kernels import accumulator_dtype
from fxquant.backends.integer.modules import QuantizedOperand
from fxquant.quantizers import AffineQuantizer
from fxquant.quantizers.ops import broadcast

# Bits of a multiplier in addition to the bits of the codes, with which the rounding error of the
# multiplier is at most 2^-13 of a step.
_SPARE_BITS = 12
# Fraction bits of an activation function's values where no quantizer reads them.
FUNCTION_BITS = 24


def table_of(quantizer: AffineQuantizer, function: Callable[[Tensor], Tensor]) -> Tensor:
    """Values of a function at all codes of a quantizer, float32, beginning at the smallest code."""
    codes = torch.arange(quantizer.qmin, quantizer.qmax + 1, device=quantizer.scale.device)
    return function(quantizer.dequantize(codes.to(torch.float32)))


class Lookup(nn.Module):
    """Maps codes to the entries of a table, whose first entry belongs to the smallest code."""

    table: Tensor

    def __init__(self, table: Tensor, first: int) -> None:
        super().__init__()
        self.first = first
        self.register_buffer("table", table)

    def forward(self, codes: Tensor) -> Tensor:
        """Looks up the entries of ``codes``, in the shape of ``codes``."""
        return self.table[codes.to(torch.int64) - self.first]

    def extra_repr(self) -> str:
        """Number and type of the entries."""
        return f"{len(self.table)} of {self.table.dtype}"


class IntAdd(nn.Module):
    """Adds codes on different grids: ``a + b`` as accumulators with one common unit.

    The unit is the larger scale over a power of two, so that the multiplier of the operand with
    this scale is exact. The multiplier of the other operand is rounded, which changes the sum by at
    most ``2^-13`` steps of the larger scale.

    Args:
        lhs: quantizer of ``a``, per tensor.
        rhs: quantizer of ``b``, per tensor.
    """

    def __init__(self, lhs: AffineQuantizer, rhs: AffineQuantizer) -> None:
        super().__init__()
        self.lhs, self.rhs = QuantizedOperand(lhs, None), QuantizedOperand(rhs, None)
        scales = [float(quantizer.scale) for quantizer in (lhs, rhs)]
        spans = self.lhs.bound, self.rhs.bound
        bits = max(spans).bit_length() + _SPARE_BITS
        self.scale = max(scales) / 2**bits
        self.factors = tuple(round(scale / self.scale) for scale in scales)
        self.bound = sum(span * f for span, f in zip(spans, self.factors, strict=True))

    def forward(self, lhs: Tensor, rhs: Tensor) -> Tensor:
        """Accumulators of the sum, int32, or int64 where the sum could exceed int32."""
        dtype = accumulator_dtype(self.bound)
        terms: list[Tensor] = []
        for codes, operand, factor in zip(
            (lhs, rhs), (self.lhs, self.rhs), self.factors, strict=True
        ):
            steps = codes.to(dtype)
            if operand.zero_point is not None:
                steps = steps - operand.zero_point
            terms.append(steps * factor)
        return terms[0] + terms[1]

    def extra_repr(self) -> str:
        """Multipliers of the operands."""
        return "factors={}, {}".format(*self.factors)


class IntMean(nn.Module):
    """Sums accumulators over axes in int64; the caller divides their unit by the count."""

    def __init__(self, axes: tuple[int, ...], *, keepdim: bool) -> None:
        super().__init__()
        self.axes, self.keepdim = axes, keepdim

    def forward(self, acc: Tensor) -> Tensor:
        """Sums ``acc`` over the axes."""
        total: Tensor = acc.sum(self.axes, keepdim=self.keepdim, dtype=torch.int64)
        return total


class Dequantize(nn.Module):
    """Converts accumulators to floats, for an output of the model.

    Args:
        scale: unit of the accumulators, ``()`` or ``(C,)``.
        axis: axis that the unit runs along; None per tensor.
    """

    scale: Tensor

    def __init__(self, scale: Tensor, axis: int | None) -> None:
        super().__init__()
        self.axis = axis
        self.register_buffer("scale", scale.to(torch.float32))

    def forward(self, acc: Tensor) -> Tensor:
        """Values of ``acc``, float32."""
        return acc.to(torch.float32) * broadcast(self.scale, acc.ndim, self.axis)

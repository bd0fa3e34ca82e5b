"""Modules of a lowered graph: floats to codes, codes to floats, products of codes.

Only codes pass from a quantizer to a product. The product sums codes in integers, adds the integer
bias, and multiplies by the scales, which are constant along the summed axis.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from fxquant.backends.integer.convolve import Geometry, convolve
from fxquant.backends.integer.kernels import (
    Multiply,
    Operand,
    Terms,
    accumulator_dtype,
    affine_matmul,
    sum_products,
)
from fxquant.backends.integer.log import LogOperand
from fxquant.backends.integer.twin import TwinOperand
from fxquant.quantizers import INT32_MAX, AffineQuantizer, Quantizer
from fxquant.quantizers.ops import broadcast


def storage_dtype(quantizer: Quantizer) -> torch.dtype:
    """The narrowest integer type that holds every code.

    The type is int8 or uint8 up to 8 bits, else int16, and int32 for unsigned codes of 16 bits.
    """
    least, largest = quantizer.code_range
    if quantizer.bits <= 8:
        return torch.int8 if least < 0 else torch.uint8
    return torch.int16 if largest < 2**15 else torch.int32


class ToCodes(nn.Module):
    """Quantizes floats of any shape to integer codes of the same shape.

    The module computes like the quantizer's ``quantize``, but in plain operators, which
    ``torch.compile`` can fuse with their neighbours.
    """

    scale: Tensor
    zero_point: Tensor

    def __init__(self, quantizer: AffineQuantizer) -> None:
        super().__init__()
        self.qmin, self.qmax, self.axis = quantizer.qmin, quantizer.qmax, quantizer.axis
        self.dtype = storage_dtype(quantizer)
        self.register_buffer("scale", quantizer.scale.clone())
        self.register_buffer("zero_point", quantizer.zero_point.clone())

    def forward(self, x: Tensor) -> Tensor:
        """Codes of ``x``."""
        steps = torch.round(x / broadcast(self.scale, x.ndim, self.axis))
        codes = steps + broadcast(self.zero_point, x.ndim, self.axis)
        return codes.clamp(self.qmin, self.qmax).to(self.dtype)

    def extra_repr(self) -> str:
        """Range and type of the codes."""
        return f"{self.qmin}..{self.qmax}, {self.dtype}, axis={self.axis}"


class FromCodes(nn.Module):
    """Dequantizes integer codes to float32, for an operation that stays float."""

    scale: Tensor
    zero_point: Tensor

    def __init__(self, quantizer: AffineQuantizer) -> None:
        super().__init__()
        self.axis = quantizer.axis
        self.register_buffer("scale", quantizer.scale.clone())
        self.register_buffer("zero_point", quantizer.zero_point.clone())

    def forward(self, codes: Tensor) -> Tensor:
        """Values of ``codes``."""
        steps = codes.to(self.scale.dtype) - broadcast(self.zero_point, codes.ndim, self.axis)
        return steps * broadcast(self.scale, codes.ndim, self.axis)


class QuantizedOperand(nn.Module):
    """Operand of a product with uniform codes: its scale, zero point and bound.

    Args:
        quantizer: the operand's quantizer.
        axis: axis of the operand, as the product reads it, that the scale runs along; None per
            tensor. The axis is negative where the number of axes is not known.
    """

    scale: Tensor
    zero_point: Tensor | None

    def __init__(self, quantizer: AffineQuantizer, axis: int | None) -> None:
        super().__init__()
        self.axis = axis
        centred = not bool(quantizer.zero_point.any())
        zeros = quantizer.zero_point
        self.bound = int(torch.maximum(zeros - quantizer.qmin, quantizer.qmax - zeros).max())
        self.register_buffer("scale", quantizer.scale.clone())
        zero = None if centred else quantizer.zero_point.to(torch.int32)
        self.register_buffer("zero_point", zero)

    def forward(self, codes: Tensor) -> Terms:
        """Joins ``codes`` with the zero point and the bound of the operand."""
        zero = self.zero_point
        if zero is not None:
            zero = broadcast(zero, codes.ndim, self.axis)
        return ((Operand(codes, zero, self.bound), 0),)

    def factor(self, ndim: int) -> Tensor:
        """The scale, shaped to broadcast against a product of ``ndim`` axes."""
        return broadcast(self.scale, ndim, self.axis)

    def extra_repr(self) -> str:
        """Bound of the centred codes, axis of the scale."""
        return f"bound={self.bound}, axis={self.axis}, zero_point={self.zero_point is not None}"


# Operands of products, by kind of quantizer.
AnyOperand = QuantizedOperand | TwinOperand | LogOperand


class IntMatmul(nn.Module):
    """Product ``lhs @ rhs`` of codes; a scale may run along any axis but the summed one."""

    def __init__(self, lhs: AnyOperand, rhs: AnyOperand) -> None:
        super().__init__()
        self.lhs, self.rhs = lhs, rhs

    def forward(self, lhs: Tensor, rhs: Tensor) -> Tensor:
        """Float product ``(..., M, N)`` of codes ``(..., M, K)`` and ``(..., K, N)``."""
        total = self.accumulate(affine_matmul, lhs, rhs)
        unit = self.lhs.factor(lhs.ndim) * self.rhs.factor(rhs.ndim)
        return total.to(unit.dtype) * unit

    def accumulate(self, multiply: Multiply, lhs: Tensor, rhs: Tensor) -> Tensor:
        """The product in units of the product of both scales, int32 or int64."""
        return sum_products(self.lhs(lhs), self.rhs(rhs), multiply, lhs.shape[-1])


class IntLinear(nn.Module):
    """Linear layer of codes, ``x @ weight^T + bias``.

    Args:
        x: the input, whose scale may run along any axis but the last.
        weight: the transposed weight, with its output channels on axis -1.
        bias_codes: bias in units of the accumulator, ``(N,)``, or None.
    """

    bias_codes: Tensor | None

    def __init__(self, x: AnyOperand, weight: QuantizedOperand, bias_codes: Tensor | None) -> None:
        super().__init__()
        self.input, self.weight = x, weight
        self.register_buffer("bias_codes", bias_codes)

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Float output ``(..., N)``.

        Args:
            x: codes ``(..., K)``.
            weight: codes ``(N, K)``.
            bias: float ``(N,)``, added after the scales where bias_codes is None.
        """
        total = self.accumulate(affine_matmul, x, weight)
        unit = self.input.factor(x.ndim) * self.weight.factor(2)
        out = total.to(unit.dtype) * unit
        return out if bias is None else out + bias

    def accumulate(self, multiply: Multiply, x: Tensor, weight: Tensor) -> Tensor:
        """The product plus the integer bias in units of the product of both scales."""
        terms = self.input(x), self.weight(weight.t())
        total = sum_products(*terms, multiply, x.shape[-1])
        return total if self.bias_codes is None else total + self.bias_codes


class IntConv(nn.Module):
    """Convolution of codes in one to three dimensions.

    Args:
        x: the input, with one scale.
        weight: the weight, with one scale or one for each output channel (axis 0).
        bias_codes: bias in units of the accumulator, ``(N,)``, or None.
        geometry: stride, padding, dilation, groups.
    """

    bias_codes: Tensor | None

    def __init__(
        self, x: AnyOperand, weight: QuantizedOperand, bias_codes: Tensor | None, geometry: Geometry
    ) -> None:
        super().__init__()
        self.input, self.weight, self.geometry = x, weight, geometry
        self.register_buffer("bias_codes", bias_codes)

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Float output ``(B, N, *spatial')``, without B where ``x`` has no batch axis.

        Args:
            x: codes ``(B, C, *spatial)`` or ``(C, *spatial)``.
            weight: codes ``(N, C / groups, *kernel)``.
            bias: float ``(N,)``, added after the scales where bias_codes is None.
        """
        if x.ndim < weight.ndim:
            return self.forward(x.unsqueeze(0), weight, bias).squeeze(0)
        along = (-1, *[1] * (weight.ndim - 2))
        total = self.accumulate(affine_matmul, x, weight)
        unit = self.input.scale * self.weight.scale
        out = total.to(unit.dtype) * (unit.view(along) if unit.ndim else unit)
        return out if bias is None else out + bias.view(along)

    def accumulate(self, multiply: Multiply, x: Tensor, weight: Tensor) -> Tensor:
        """The convolution plus the integer bias in units of the product of both scales."""
        convolved = partial(convolve, geometry=self.geometry, multiply=multiply)
        depth = weight.shape[1:].numel()
        total = sum_products(self.input(x), self.weight(weight), convolved, depth)
        if self.bias_codes is None:
            return total
        return total + self.bias_codes.view(-1, *[1] * (weight.ndim - 2))

    def extra_repr(self) -> str:
        """Geometry of the convolution."""
        return str(self.geometry)


def bias_codes(bias: Tensor, unit: Tensor, largest: int) -> Tensor | None:
    """A bias in whole numbers of accumulator units; None where it is not a multiple of units.

    Args:
        bias: float ``(N,)``.
        unit: unit of the accumulator, ``()`` or ``(N,)``.
        largest: bound of the sums to which the bias is added.

    Returns:
        ``(N,)``, int32, or int64 where the sum with the bias could exceed int32.
    """
    codes = torch.round(bias.double() / unit.double())
    peak = int(codes.abs().max()) if codes.numel() else 0
    if peak >= INT32_MAX or not torch.equal((codes * unit.double()).to(bias.dtype), bias):
        return None
    return codes.to(accumulator_dtype(largest + peak))

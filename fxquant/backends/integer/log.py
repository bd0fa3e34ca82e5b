"""Codes of logarithmic quantizers in the integer backend (arXiv 2407.12951).

A code ``c`` stands for ``s 2^(-c n / d)``. With ``c n = d shift + rest`` that is an entry of a
table of ``d`` whole numbers, shifted right; counted in units of the smallest value's, shifted left.
Codes are decoded so to whole numbers, which a product multiplies exactly.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fxquant.backends.integer.kernels import Operand, Terms
from fxquant.backends.integer.requantize import WORD_BITS
from fxquant.errors import LoweringError
from fxquant.quantizers import LogQuantizer
from fxquant.quantizers.log_ops import log_borders, log_depth, log_table

_BYTE_MAX = 255


class LogToCodes(nn.Module):
    """Quantizes: floats of any shape to uint8 codes of that shape.

    The arithmetic of the quantizer's own ``quantize`` in plain operators.
    """

    borders: Tensor

    def __init__(self, quantizer: LogQuantizer) -> None:
        super().__init__()
        self.zero_code = quantizer.zero_code
        scale = quantizer.scale
        shares = torch.tensor(log_borders(*quantizer.form), dtype=scale.dtype, device=scale.device)
        self.register_buffer("borders", shares * scale)

    def forward(self, x: Tensor) -> Tensor:
        """Codes of ``x``."""
        places = torch.bucketize(x.contiguous(), self.borders)
        return (self.zero_code - places).to(torch.uint8)

    def extra_repr(self) -> str:
        """The code of zero."""
        return f"zero_code={self.zero_code}"


class LogFromCodes(nn.Module):
    """Dequantizes, for an operation that stays float: uint8 codes to float32."""

    values: Tensor

    def __init__(self, quantizer: LogQuantizer) -> None:
        super().__init__()
        codes = torch.arange(quantizer.zero_code + 1, device=quantizer.scale.device)
        self.register_buffer("values", quantizer.dequantize(codes.to(quantizer.scale.dtype)))

    def forward(self, codes: Tensor) -> Tensor:
        """Values of ``codes``."""
        return self.values[codes.to(torch.int64)]


class LogOperand(nn.Module):
    """One operand of a product, given as codes.

    Args:
        quantizer: the operand's quantizer.
    """

    scale: Tensor
    table: Tensor

    def __init__(self, quantizer: LogQuantizer) -> None:
        super().__init__()
        self.n, self.d, self.zero_code = quantizer.n, quantizer.d, quantizer.zero_code
        self.depth, self.bound = log_depth(*quantizer.form), quantizer.magnitudes[0]
        self.dtype = torch.uint8 if self.bound <= _BYTE_MAX else torch.int32
        self.register_buffer("scale", quantizer.unit.clone())
        table = torch.tensor(log_table(self.d), dtype=torch.int32, device=quantizer.scale.device)
        self.register_buffer("table", table)

    def forward(self, codes: Tensor) -> Terms:
        """The operand that ``codes`` are, in units of the scale."""
        steps = codes.to(torch.int32) * self.n
        shift = torch.div(steps, self.d, rounding_mode="floor")
        entry = self.table[steps - shift * self.d]
        # The shift of the code of zero would be a negative one.
        values = entry << (self.depth - shift).clamp(min=0)
        values = torch.where(codes < self.zero_code, values, 0)
        return ((Operand(values.to(self.dtype), None, self.bound), 0),)

    def factor(self, ndim: int) -> Tensor:
        """The scale, of which a product of any number of axes has one."""
        return self.scale

    def extra_repr(self) -> str:
        """Octaves between codes, largest shift, bound of the values."""
        return f"octaves={self.n}/{self.d}, depth={self.depth}, bound={self.bound}"


class LogRequantize(nn.Module):
    """Accumulators to the codes of a logarithmic quantizer, by comparing them with its borders.

    Args:
        quantizer: the quantizer.
        ratio: unit of the accumulators over its scale, float64, positive, ``()``.

    Raises:
        LoweringError: the accumulators have several units, or a factor before the quantizer is not
            positive.
    """

    borders: Tensor

    def __init__(self, quantizer: LogQuantizer, ratio: Tensor) -> None:
        super().__init__()
        if ratio.ndim or not bool(ratio > 0):
            raise LoweringError(
                "a logarithmic quantizer takes accumulators of one unit and a positive factor"
            )
        self.zero_code = quantizer.zero_code
        shares = torch.tensor(
            log_borders(*quantizer.form), dtype=torch.float64, device=ratio.device
        )
        # A whole number is above a border where it is above the whole number below that.
        borders = torch.floor(shares / ratio).clamp(max=2.0**WORD_BITS)
        self.register_buffer("borders", borders.to(torch.int64))

    def forward(self, acc: Tensor) -> Tensor:
        """Codes of the values that ``acc`` stand for."""
        places = torch.bucketize(acc.to(torch.int64).contiguous(), self.borders)
        return (self.zero_code - places).to(torch.uint8)

    def extra_repr(self) -> str:
        """The code of zero."""
        return f"zero_code={self.zero_code}"

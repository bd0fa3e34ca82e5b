"""Codes of logarithmic quantizers in the integer backend (arXiv 2407.12951).

A code ``c`` represents ``s 2^(-c n / d)``. With ``c n = d shift + rest`` this is an entry of a
table of ``d`` whole numbers, shifted right by ``shift``; in units of the smallest power, the entry
is shifted left. In this way codes are decoded to whole numbers, which a product multiplies exactly.
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
    """Quantizes floats of any shape to uint8 codes of the same shape.

    The module computes like the quantizer's ``quantize``, but in plain operators.
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
        """Code of zero."""
        return f"zero_code={self.zero_code}"


class LogFromCodes(nn.Module):
    """Dequantizes uint8 codes to float32, for an operation that stays float."""

    values: Tensor

    def __init__(self, quantizer: LogQuantizer) -> None:
        super().__init__()
        codes = torch.arange(quantizer.zero_code + 1, device=quantizer.scale.device)
        self.register_buffer("values", quantizer.dequantize(codes.to(quantizer.scale.dtype)))

    def forward(self, codes: Tensor) -> Tensor:
        """Values of ``codes``."""
        return self.values[codes.to(torch.int64)]


class LogOperand(nn.Module):
    """Decodes the codes of a logarithmic quantizer to an operand of a product.

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
        """Decodes ``codes`` to whole numbers in units of the scale."""
        steps = codes.to(torch.int32) * self.n
        shift = torch.div(steps, self.d, rounding_mode="floor")
        entry = self.table[steps - shift * self.d]
        # The left shift of zero's code would be negative.
        values = entry << (self.depth - shift).clamp(min=0)
        values = torch.where(codes < self.zero_code, values, 0)
        return ((Operand(values.to(self.dtype), None, self.bound), 0),)

    def factor(self, ndim: int) -> Tensor:
        """The scale, which is one for the tensor, whatever the number of axes."""
        return self.scale

    def extra_repr(self) -> str:
        """Octaves between codes, largest shift, bound of the values."""
        return f"octaves={self.n}/{self.d}, depth={self.depth}, bound={self.bound}"


class LogRequantize(nn.Module):
    """Requantizes accumulators to the codes of a logarithmic quantizer.

    The module compares accumulators with the borders between codes.

    Args:
        quantizer: the quantizer.
        ratio: unit of the accumulators over the quantizer's scale, float64, positive, ``()``.

    Raises:
        LoweringError: the accumulators have several units, or a factor before the quantizer is not
            positive.
    """

    borders: Tensor

    def __init__(self, quantizer: LogQuantizer, ratio: Tensor) -> None:
        super().__init__()
        if ratio.ndim or not bool(ratio > 0):
            raise LoweringError(
                "a logarithmic quantizer needs accumulators of one unit and a positive factor",
                got=ratio,
                expected="one positive factor",
            )
        self.zero_code = quantizer.zero_code
        shares = torch.tensor(
            log_borders(*quantizer.form), dtype=torch.float64, device=ratio.device
        )
        # A whole number is above a border where it is above the next whole number below the border.
        borders = torch.floor(shares / ratio).clamp(max=2.0**WORD_BITS)
        self.register_buffer("borders", borders.to(torch.int64))

    def forward(self, acc: Tensor) -> Tensor:
        """Codes of the values that the accumulators ``acc`` represent."""
        places = torch.bucketize(acc.to(torch.int64).contiguous(), self.borders)
        return (self.zero_code - places).to(torch.uint8)

    def extra_repr(self) -> str:
        """Code of zero."""
        return f"zero_code={self.zero_code}"

"""Code words of the twin uniform quantizer in the integer backend (arXiv 2111.12293).

A code word is a region bit above a magnitude. A product separates code words into the magnitudes of
the fine and of the coarse region, multiplies both, and shifts the coarse product left:
``(a_q + b_q 2^m) D_R1``. Where 8-bit codes in units of ``D_R1`` represent all values, one product
of these codes is enough.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fxquant.backends.integer.kernels import Operand, Terms
from fxquant.quantizers import TwinUniformQuantizer
from fxquant.quantizers.ops import twin_values, twin_words


class TwinToCodes(nn.Module):
    """Quantizes floats of any shape to uint8 code words of the same shape."""

    scale: Tensor

    def __init__(self, quantizer: TwinUniformQuantizer) -> None:
        super().__init__()
        self.form = (quantizer.shift, quantizer.bits, quantizer.two_sided)
        self.register_buffer("scale", quantizer.scale.clone())

    def forward(self, x: Tensor) -> Tensor:
        """Code words of ``x``."""
        return twin_words(x, self.scale, *self.form).to(torch.uint8)

    def extra_repr(self) -> str:
        """Shift, bit-width, sidedness."""
        return "shift={}, bits={}, two_sided={}".format(*self.form)


class TwinFromCodes(nn.Module):
    """Dequantizes uint8 code words to float32, for an operation that stays float."""

    scale: Tensor

    def __init__(self, quantizer: TwinUniformQuantizer) -> None:
        super().__init__()
        self.form = (quantizer.shift, quantizer.bits, quantizer.two_sided)
        self.register_buffer("scale", quantizer.scale.clone())

    def forward(self, codes: Tensor) -> Tensor:
        """Values of ``codes``."""
        return twin_values(codes.to(self.scale.dtype), self.scale, *self.form)


class TwinOperand(nn.Module):
    """Separates the code words of a twin quantizer into operands of products.

    Args:
        quantizer: the operand's quantizer.
    """

    scale: Tensor
    zero_point: Tensor | None

    def __init__(self, quantizer: TwinUniformQuantizer) -> None:
        super().__init__()
        self.levels, self.shift = quantizer.levels, quantizer.shift
        self.two_sided = quantizer.two_sided
        self.bound = (self.levels - 1) << self.shift
        self.register_buffer("scale", quantizer.scale.clone())
        one_grid = quantizer.fits_byte
        zero = torch.tensor(quantizer.grid_zero_point, dtype=torch.int32) if one_grid else None
        self.register_buffer("zero_point", zero)

    def forward(self, codes: Tensor) -> Terms:
        """Terms of the operand in units of the fine scale: one for each region, or one for both."""
        magnitudes, coarse = codes & (self.levels - 1), codes >= self.levels
        low = torch.where(coarse, 0, magnitudes).to(torch.int8)
        high = torch.where(coarse, magnitudes, 0).to(torch.int8)
        low = -low if self.two_sided else low
        if self.zero_point is None:
            bound = self.levels - 1
            return (Operand(low, None, bound), 0), (Operand(high, None, bound), self.shift)
        steps = low.to(torch.int32) + (high.to(torch.int32) << self.shift) + self.zero_point
        return ((Operand(steps.to(torch.uint8), self.zero_point, self.bound), 0),)

    def factor(self, ndim: int) -> Tensor:
        """The fine scale, which is one for the tensor, whatever the number of axes."""
        return self.scale

    def extra_repr(self) -> str:
        """Levels, shift, number of products."""
        products = 2 if self.zero_point is None else 1
        return f"levels={self.levels}, shift={self.shift}, products={products}"

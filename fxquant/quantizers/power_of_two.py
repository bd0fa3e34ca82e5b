"""The power-of-two quantizer: a uniform one whose scales are powers of two.

Such scales are what shift-only accelerators take, and they make every step from accumulators to
codes a shift: the unit of an accumulator, ``s_x s_w``, over the scale of the codes behind it is a
power of two as well.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from fxquant.errors import CalibrationError
from fxquant.quantizers.uniform import UniformQuantizer


class PowerOfTwoQuantizer(UniformQuantizer):
    """Uniform quantizer with scales ``2^n``, n a whole number (arXiv 1903.08066 trains them).

    A range is covered by the least power of two that reaches its ends; fits by squared error and
    scale searches choose among the powers below it too, down to those that clip most values.

    Invariant, beyond those of the class it derives from: every scale is a power of two.
    """

    type_name: ClassVar[str] = "power_of_two"

    def __init__(
        self, scale: Tensor, zero_point: Tensor, *, bits: int, signed: bool, axis: int | None
    ) -> None:
        """Makes the quantizer.

        Raises:
            CalibrationError: the parameters break an invariant.
        """
        super().__init__(scale, zero_point, bits=bits, signed=signed, axis=axis)
        if not bool(_is_power(self.scale).all()):
            raise CalibrationError("a scale of a power-of-two quantizer is not a power of two")

    @staticmethod
    def least_scale(scale: Tensor) -> Tensor:
        """The least power of two at or above ``scale``."""
        mantissa, exponent = torch.frexp(scale)
        return torch.ldexp(torch.ones_like(scale), exponent - (mantissa == 0.5).to(exponent.dtype))

    @staticmethod
    def trained_scale(scale: Tensor) -> Tensor:
        """The power of two nearest to ``scale`` by its logarithm; the gradient passes through."""
        fixed = scale.detach()
        exponent = torch.log2(fixed).round().to(torch.int32)
        power = torch.ldexp(torch.ones_like(fixed), exponent)
        # The second factor is one exactly.
        return power * (scale / fixed)

    def fault(self) -> str | None:
        """A clause that names what is wrong with loaded numbers; None where nothing is."""
        broken = super().fault()
        if broken is None and not bool(_is_power(self.scale).all()):
            return "a scale is not a power of two"
        return broken


def _is_power(scale: Tensor) -> Tensor:
    return torch.frexp(scale)[0] == 0.5

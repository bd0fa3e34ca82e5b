"""Power-of-two quantizer: a uniform quantizer whose scales are powers of two.

Shift-only accelerators need such scales. With them every step from accumulators to codes is a
shift: the unit of an accumulator, ``s_x s_w``, over the scale of the codes behind it is a power of
two as well.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from fxquant.config.spec import TensorSpec
from fxquant.errors import CalibrationError
from fxquant.quantizers.uniform import UniformQuantizer


class PowerOfTwoQuantizer(UniformQuantizer):
    """Uniform quantizer with scales ``2^n``, n a whole number (arXiv 1903.08066 trains them).

    A range is covered by the least power of two that reaches its ends; fits by squared error and
    scale searches choose among the powers below it too, down to those that clip most values.

    Between powers of two exact ties are common, and a runtime may add the zero_point before it
    rounds half to even, as onnxruntime's addition of codes does: the result is the same where the
    zero_point is even. The zero_point of this class is therefore even, which moves the range by at
    most one step.

    Invariants, beyond those of the class it derives from: every scale is a power of two, every
    zero_point even.
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
            raise CalibrationError(
                "a scale of a power-of-two quantizer is not a power of two",
                got=self.scale,
                expected="powers of two",
            )
        if bool((self.zero_point % 2 != 0).any()):
            raise CalibrationError(
                "a zero_point of a power-of-two quantizer is not even",
                got=self.zero_point,
                expected="even",
            )

    @classmethod
    def affine_parameters(cls, lo: Tensor, hi: Tensor, spec: TensorSpec) -> tuple[Tensor, Tensor]:
        """Scale and even zero_point for the range ``[lo, hi]``; see the class it derives from."""
        scale, zero_point = super().affine_parameters(lo, hi, spec)
        qmin, qmax = spec.code_range
        return scale, _nearest_even(zero_point, qmin, qmax)

    def whole_zero_point(self, zero_point: Tensor) -> Tensor:
        """The even zero_point nearest to a fractional one."""
        return _nearest_even(zero_point, self.qmin, self.qmax)

    @staticmethod
    def least_scale(scale: Tensor) -> Tensor:
        """The least power of two at or above ``scale``."""
        mantissa, exponent = torch.frexp(scale)
        least = exponent - (mantissa == 0.5).to(exponent.dtype)
        return torch.ldexp(torch.ones_like(scale), least.clamp(max=127))  # float32 has no 2^128

    @staticmethod
    def trained_scale(scale: Tensor) -> Tensor:
        """The power of two nearest to ``scale`` in the logarithm; the gradient passes through."""
        value = scale.detach()
        exponent = torch.log2(value).round().to(torch.int32)
        power = torch.ldexp(torch.ones_like(value), exponent)
        # The second factor is one exactly.
        return power * (scale / value)

    def fault(self) -> str | None:
        """A clause that names the fault of loaded scales or zero points; None without a fault."""
        fault = super().fault()
        if fault is None and not bool(_is_power(self.scale).all()):
            return "a scale is not a power of two"
        return fault


def _is_power(scale: Tensor) -> Tensor:
    return torch.frexp(scale)[0] == 0.5


def _nearest_even(zero_point: Tensor, qmin: int, qmax: int) -> Tensor:
    return ((zero_point / 2).round() * 2).clamp(qmin, qmax - 1)  # the last code is odd

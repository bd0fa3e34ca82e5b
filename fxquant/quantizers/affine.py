"""Quantizers with a scale and a zero_point: ``x ~ (code - zero_point) * scale``."""

from __future__ import annotations

import torch
from torch import Tensor

from fxquant.errors import CalibrationError
from fxquant.quantizers import ops
from fxquant.quantizers.base import Quantizer

INT32_MAX = 2**31 - 1
# Below this bound the reciprocal of a scale overflows and x / scale becomes infinite.
LEAST_SCALE = torch.finfo(torch.float32).tiny * 2**24


class AffineQuantizer(Quantizer):
    """Quantizer to equally spaced values, per tensor or along one axis.

    Invariants: ``scale`` is float32, finite, positive, of shape ``()`` or ``(C,)``;
    ``zero_point`` has the shape of ``scale`` and holds whole numbers in ``zero_range``; ``axis`` is
    None exactly if the shape is ``()``.
    """

    zero_point: Tensor

    def __init__(
        self, scale: Tensor, zero_point: Tensor, *, bits: int, signed: bool, axis: int | None
    ) -> None:
        """Makes the quantizer.

        Raises:
            CalibrationError: the parameters break an invariant.
        """
        super().__init__()
        self._bits, self.signed, self.axis = bits, signed, axis
        self.qmin = -(1 << (bits - 1)) if signed else 0
        self.qmax = self.qmin + (1 << bits) - 1
        self.register_buffer("scale", scale.detach().float().contiguous())
        self.register_buffer("zero_point", zero_point.detach().float().contiguous())
        if scale.shape != zero_point.shape or (scale.ndim == 0) != (axis is None):
            raise CalibrationError(
                f"scale {tuple(scale.shape)}, zero_point {tuple(zero_point.shape)} and axis "
                f"{axis} do not fit together: () with axis None, or (C,) with an axis",
                got=(tuple(scale.shape), tuple(zero_point.shape), axis),
            )
        if not bool((torch.isfinite(scale) & (scale > 0)).all()):
            raise CalibrationError(
                "a scale is not finite and positive", got=scale, expected="finite and positive"
            )

    @property
    def bits(self) -> int:
        """Bit-width of the codes."""
        return self._bits

    @property
    def code_range(self) -> tuple[int, int]:
        """Smallest and largest code, both included."""
        return self.qmin, self.qmax

    @property
    def zero_range(self) -> tuple[int, int]:
        """Smallest and largest value that ``zero_point`` may have."""
        return self.qmin, self.qmax

    def whole_zero_point(self, zero_point: Tensor) -> Tensor:
        """The zero_point nearest to a fractional one that this kind of quantizer can have."""
        return zero_point.round()

    @property
    def scale_axis(self) -> int | None:
        """Axis whose entries have a scale each; None with one scale for the tensor."""
        return self.axis

    @property
    def zero_codes(self) -> Tensor:
        """The zero_point; it lies below ``code_range`` where zero is not a value of the grid."""
        return self.zero_point

    @property
    def accumulator_unit(self) -> Tensor:
        """The scale: a code is a whole number of scales away from the zero_point."""
        return self.scale

    def quantize(self, x: Tensor) -> Tensor:
        """Codes of ``x``."""
        codes: Tensor = ops.quantize(
            x, self.scale, self.zero_point, self.qmin, self.qmax, self.axis
        )
        return codes

    def dequantize(self, codes: Tensor) -> Tensor:
        """Values of ``codes``."""
        values: Tensor = ops.dequantize(codes, self.scale, self.zero_point, self.axis)
        return values

    def forward(self, x: Tensor) -> Tensor:
        """Values of ``x`` rounded to the grid."""
        values: Tensor = ops.fake_quantize(
            x, self.scale, self.zero_point, self.qmin, self.qmax, self.axis
        )
        return values

    def fault(self) -> str | None:
        """A clause that names the fault of loaded scales or zero points; None without a fault."""
        zero, (low, high) = self.zero_point, self.zero_range
        if not bool(((zero == zero.round()) & (zero >= low) & (zero <= high)).all()):
            return super().fault() or f"a zero_point is not a whole number in {low}..{high}"
        return super().fault()

    def extra_repr(self) -> str:
        """Bit-width, signedness, axis."""
        return f"bits={self._bits}, signed={self.signed}, axis={self.axis}"


def accumulator_scale(activation: Quantizer, weight: AffineQuantizer) -> Tensor:
    """Unit of a product's int32 accumulator: ``s_x s_w``, or ``D_R1 s_w`` for a twin quantizer.

    Args:
        activation: per-tensor quantizer with an :attr:`Quantizer.accumulator_unit`.
        weight: quantizer per tensor, or per output channel on axis 0.

    Returns:
        The unit, float32, ``()`` or ``(N,)``.
    """
    unit = activation.accumulator_unit
    assert unit is not None, f"{type(activation).__name__} has no accumulator unit"
    return unit * weight.scale

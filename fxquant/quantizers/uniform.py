"""The uniform (affine) quantizer: ``x ~ (code - zero_point) * scale``."""

from __future__ import annotations

import torch
from torch import Tensor

from fxquant.config.spec import TensorSpec
from fxquant.errors import CalibrationError
from fxquant.quantizers import ops
from fxquant.quantizers.base import Quantizer

INT32_MAX = 2**31 - 1
# Below this a scale's reciprocal overflows and x / scale becomes infinite.
LEAST_SCALE = torch.finfo(torch.float32).tiny * 2**24


def affine_parameters(lo: Tensor, hi: Tensor, spec: TensorSpec) -> tuple[Tensor, Tensor]:
    """Scale and zero_point that cover the range ``[lo, hi]``.

    Args:
        lo: smallest values, ``()`` or ``(C,)``.
        hi: largest values, of the same shape.
        spec: bit-width and symmetry.

    Returns:
        ``(scale, zero_point)``, float32, of the same shape. Zero is always on the grid, so that
        padding and masked positions stay exact. A range of width zero gets a scale that
        represents its value exactly.
    """
    qmin, qmax = spec.code_range
    lo, hi = lo.float().clamp(max=0.0), hi.float().clamp(min=0.0)
    if spec.symmetric:
        scale = torch.maximum(-lo / -qmin, hi / qmax)
        scale = torch.where(scale > LEAST_SCALE, scale, torch.ones_like(scale))
        return scale, torch.zeros_like(scale)
    scale = (hi - lo) / (qmax - qmin)
    scale = torch.where(scale > LEAST_SCALE, scale, torch.ones_like(scale))
    return scale, (qmin - lo / scale).round().clamp(qmin, qmax)


class UniformQuantizer(Quantizer):
    """Affine quantizer, per tensor or along one axis.

    Invariants: ``scale`` is float32, finite, positive, of shape ``()`` or ``(C,)``;
    ``zero_point`` has its shape and holds whole numbers in ``[qmin, qmax]``; ``axis`` is None
    exactly if the shape is ``()``.
    """

    scale: Tensor
    zero_point: Tensor

    def __init__(
        self, scale: Tensor, zero_point: Tensor, *, bits: int, signed: bool, axis: int | None
    ) -> None:
        """Makes the quantizer.

        Raises:
            CalibrationError: the parameters break an invariant.
        """
        super().__init__()
        if scale.shape != zero_point.shape or (scale.ndim == 0) != (axis is None):
            raise CalibrationError(
                f"scale {tuple(scale.shape)}, zero_point {tuple(zero_point.shape)} and axis "
                f"{axis} do not fit together: () with axis None, or (C,) with an axis"
            )
        if not bool((torch.isfinite(scale) & (scale > 0)).all()):
            raise CalibrationError("a scale is not finite and positive")
        self._bits, self.signed, self.axis = bits, signed, axis
        self.qmin = -(1 << (bits - 1)) if signed else 0
        self.qmax = self.qmin + (1 << bits) - 1
        self.register_buffer("scale", scale.detach().float().contiguous())
        self.register_buffer("zero_point", zero_point.detach().float().contiguous())

    @classmethod
    def from_range(
        cls, lo: Tensor, hi: Tensor, spec: TensorSpec, axis: int | None
    ) -> UniformQuantizer:
        """The quantizer of ``spec`` that covers ``[lo, hi]`` (see :func:`affine_parameters`)."""
        scale, zero_point = affine_parameters(lo, hi, spec)
        return cls(scale, zero_point, bits=spec.bits, signed=spec.symmetric, axis=axis)

    @property
    def bits(self) -> int:
        """Bit-width of the codes."""
        return self._bits

    @property
    def zero_range(self) -> tuple[int, int]:
        """Smallest and largest value that ``zero_point`` may have."""
        return self.qmin, self.qmax

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
        """The values of ``x`` moved to the grid."""
        values: Tensor = ops.fake_quantize(
            x, self.scale, self.zero_point, self.qmin, self.qmax, self.axis
        )
        return values

    def config(self) -> dict[str, object]:
        """Bit-width, signedness and axis."""
        return {
            "type": "uniform",
            "bits": self._bits,
            "signed": self.signed,
            "axis": self.axis,
            "shape": list(self.scale.shape),
        }

    @classmethod
    def from_config(cls, config: dict[str, object]) -> UniformQuantizer:
        """Rebuilds the module; the buffers are then loaded from the state dict."""
        shape = [int(n) for n in config["shape"]]  # type: ignore[attr-defined]
        axis = config["axis"]
        return cls(
            torch.ones(shape),
            torch.zeros(shape),
            bits=int(config["bits"]),  # type: ignore[call-overload]
            signed=bool(config["signed"]),
            axis=None if axis is None else int(axis),  # type: ignore[call-overload]
        )

    def extra_repr(self) -> str:
        """Bit-width, signedness, axis."""
        return f"bits={self._bits}, signed={self.signed}, axis={self.axis}"

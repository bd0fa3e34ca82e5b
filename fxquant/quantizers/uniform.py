"""Uniform quantizer: equally spaced values, one of which is zero."""

from __future__ import annotations

from typing import ClassVar, Self

import torch
from torch import Tensor

from fxquant.config.spec import TensorSpec
from fxquant.quantizers.affine import LEAST_SCALE, AffineQuantizer


class UniformQuantizer(AffineQuantizer):
    """Affine quantizer whose grid holds zero, so that padding and masked positions are exact."""

    type_name: ClassVar[str] = "uniform"

    @classmethod
    def affine_parameters(cls, lo: Tensor, hi: Tensor, spec: TensorSpec) -> tuple[Tensor, Tensor]:
        """Scale and zero_point that cover the range ``[lo, hi]``.

        Args:
            lo: smallest values, ``()`` or any shape of units, such as ``(C,)``.
            hi: largest values, of the same shape.
            spec: bit-width and symmetry.

        Returns:
            ``(scale, zero_point)``, float32, of the same shape. A range of width zero gets a scale
            that represents its value exactly.
        """
        qmin, qmax = spec.code_range
        lo, hi = lo.float().clamp(max=0.0), hi.float().clamp(min=0.0)
        if spec.symmetric:
            scale = torch.maximum(-lo / -qmin, hi / qmax)
            scale = torch.where(scale > LEAST_SCALE, scale, torch.ones_like(scale))
            scale = cls.least_scale(scale)
            return scale, torch.zeros_like(scale)
        scale = (hi - lo) / (qmax - qmin)
        scale = torch.where(scale > LEAST_SCALE, scale, torch.ones_like(scale))
        scale = cls.least_scale(scale)
        return scale, (qmin - lo / scale).round().clamp(qmin, qmax)

    @staticmethod
    def least_scale(scale: Tensor) -> Tensor:
        """The least scale, at or above ``scale``, that this kind of quantizer can have."""
        return scale

    @staticmethod
    def trained_scale(scale: Tensor) -> Tensor:
        """Restricts a trained scale to the scales of this class; the gradient passes through."""
        return scale

    @classmethod
    def from_range(cls, lo: Tensor, hi: Tensor, spec: TensorSpec, axis: int | None) -> Self:
        """The quantizer of ``spec`` that covers ``[lo, hi]`` (see :meth:`affine_parameters`)."""
        scale, zero_point = cls.affine_parameters(lo, hi, spec)
        return cls(scale, zero_point, bits=spec.bits, signed=spec.symmetric, axis=axis)

    def with_parameters(self, scale: Tensor, zero_point: Tensor) -> Self:
        """A quantizer of the same class, width and axis with other parameters of any shape."""
        return type(self)(scale, zero_point, bits=self.bits, signed=self.signed, axis=self.axis)

    def config(self) -> dict[str, object]:
        """Type, bit-width, signedness, axis and the shape of the scale."""
        return {
            "type": self.type_name,
            "bits": self.bits,
            "signed": self.signed,
            "axis": self.axis,
            "shape": list(self.scale.shape),
        }

    @classmethod
    def from_config(cls, config: dict[str, object]) -> Self:
        """Rebuilds the module; the caller then loads the buffers from the state dict."""
        shape = [int(n) for n in config["shape"]]  # type: ignore[attr-defined]
        axis = config["axis"]
        return cls(
            torch.ones(shape),
            torch.zeros(shape),
            bits=int(config["bits"]),  # type: ignore[call-overload]
            signed=bool(config["signed"]),
            axis=None if axis is None else int(axis),  # type: ignore[call-overload]
        )

"""Twin uniform quantizer: two uniform grids, one a power of two coarser (arXiv 2111.12293)."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from fxquant.config.spec import MAX_SHIFT, TensorSpec
from fxquant.errors import CalibrationError
from fxquant.quantizers import ops
from fxquant.quantizers.base import Quantizer


class TwinUniformQuantizer(Quantizer):
    """Fine grid of step ``D_R1`` and coarse grid of step ``D_R2 = 2^m D_R1`` (eq. 7-9).

    A code word is a region bit above a magnitude of ``bits - 1`` bits; with ``L = 2^(bits-1)``:

    - one-sided, for values from zero up (softmax): the fine grid ``[0, (L-1) D_R1]`` and the
      coarse grid beyond it, up to ``(L-1) D_R2``;
    - two-sided (GELU, SiLU): the fine grid for negative values down to ``-(L-1) D_R1``, the
      coarse grid for positive values up to ``(L-1) D_R2``.

    The regions of a one-sided quantizer meet half-way between the last fine and the first coarse
    value, so that every value is rounded to the nearest value of both grids. The paper cuts at
    ``2^(bits-1) D_R1``, with which values from there to ``D_R2 / 2`` are rounded to zero for
    m >= bits.

    Invariants: ``scale`` (``D_R1``) is float32, finite, positive, of shape ``()``; ``shift`` (m) is
    a whole number, at least 1 if one-sided, at least 0 otherwise.
    """

    type_name: ClassVar[str] = "twin_uniform"

    def __init__(self, scale: Tensor, *, shift: int, bits: int, two_sided: bool) -> None:
        """Makes the quantizer.

        Raises:
            CalibrationError: the parameters break an invariant.
        """
        super().__init__()
        self._bits, self.shift, self.two_sided = bits, shift, two_sided
        if scale.ndim != 0 or not bool(torch.isfinite(scale) & (scale > 0)):
            raise CalibrationError(
                "the scale of a twin quantizer is one finite positive number",
                got=scale,
                expected="one finite positive number",
            )
        if shift < (0 if two_sided else 1):
            raise CalibrationError(
                f"the shift of a twin quantizer is too small: {shift}",
                got=shift,
                expected=">= 0" if two_sided else ">= 1",
            )
        self.register_buffer("scale", scale.detach().float())

    @classmethod
    def from_range(cls, lo: Tensor, hi: Tensor, spec: TensorSpec) -> TwinUniformQuantizer:
        """The quantizer whose coarse grid reaches ``hi``.

        The quantizer is two-sided where ``lo`` is negative, and its fine grid then just covers
        ``lo``. Otherwise the fine grid fills the first step of the coarse grid.

        Args:
            lo: smallest value, ``()``.
            hi: largest value, ``()``.
            spec: bit-width and bound of the shift.
        """
        levels = 1 << (spec.bits - 1)
        low, high = max(-float(lo), 0.0), max(float(hi), 0.0)
        if low == 0:
            shift = bounded_shift(spec.bits - 1, spec, two_sided=False)
            coarse = high / (levels - 1) or 1.0
        else:
            # The step of the coarse grid must not be smaller than that of the fine grid.
            coarse = max(high / (levels - 1), low / levels)
            shift = covering_shift(coarse, low, spec)
        scale = torch.tensor(coarse / 2**shift, dtype=torch.float32, device=lo.device)
        return cls(scale, shift=shift, bits=spec.bits, two_sided=low > 0)

    @property
    def bits(self) -> int:
        """Bit-width of the codes, the region bit included."""
        return self._bits

    @property
    def accumulator_unit(self) -> Tensor:
        """Fine step ``D_R1``, of which every value is a whole multiple."""
        return self.scale

    @property
    def levels(self) -> int:
        """Number of magnitudes in a region, ``2^(bits-1)``."""
        return 1 << (self._bits - 1)

    @property
    def coarse_scale(self) -> Tensor:
        """Coarse step ``D_R2``, ``()``."""
        coarse: Tensor = self.scale * 2**self.shift
        return coarse

    @property
    def grid_zero_point(self) -> int:
        """Code of zero on the plain grid of step ``D_R1`` that holds every value."""
        return self.levels - 1 if self.two_sided else 0

    @property
    def grid_size(self) -> int:
        """Number of points of the plain grid of step ``D_R1`` that holds every value."""
        return self.grid_zero_point + ((self.levels - 1) << self.shift) + 1

    @property
    def fits_byte(self) -> bool:
        """Whether unsigned 8-bit codes can number the points of the plain grid."""
        return self.grid_size <= 256

    def quantize(self, x: Tensor) -> Tensor:
        """Code words of ``x``: ``region * 2^(bits-1) + magnitude``; zero is code 0."""
        codes: Tensor = ops.twin_quantize(x, self.scale, self.shift, self._bits, self.two_sided)
        return codes

    def dequantize(self, codes: Tensor) -> Tensor:
        """Values of ``codes``."""
        values: Tensor = ops.twin_dequantize(
            codes, self.scale, self.shift, self._bits, self.two_sided
        )
        return values

    def forward(self, x: Tensor) -> Tensor:
        """Values of ``x`` rounded to the nearest value of the two grids."""
        values: Tensor = ops.twin_fake_quantize(
            x, self.scale, self.shift, self._bits, self.two_sided
        )
        return values

    def config(self) -> dict[str, object]:
        """Type, bit-width, shift and sidedness."""
        return {
            "type": self.type_name,
            "bits": self._bits,
            "shift": self.shift,
            "two_sided": self.two_sided,
        }

    @classmethod
    def from_config(cls, config: dict[str, object]) -> TwinUniformQuantizer:
        """Rebuilds the module; the caller then loads the buffer from the state dict."""
        return cls(
            torch.ones(()),
            bits=int(config["bits"]),  # type: ignore[call-overload]
            shift=int(config["shift"]),  # type: ignore[call-overload]
            two_sided=bool(config["two_sided"]),
        )

    def extra_repr(self) -> str:
        """Bit-width, shift, sidedness."""
        return f"bits={self._bits}, shift={self.shift}, two_sided={self.two_sided}"


def bounded_shift(shift: int, spec: TensorSpec, *, two_sided: bool) -> int:
    """Clamps ``shift`` to the range that the quantizer and the spec allow."""
    largest = MAX_SHIFT if spec.max_shift is None else spec.max_shift
    return min(max(shift, 0 if two_sided else 1), largest)


def covering_shift(coarse: float, low: float, spec: TensorSpec) -> int:
    """Largest allowed shift m with which the fine grid of step ``D_R2 / 2^m`` covers ``-low``.

    Args:
        coarse: ``D_R2``.
        low: largest negative magnitude, positive.
        spec: bit-width and bound of the shift.
    """
    # Values within the last half step need no further code, hence L and not L - 1.
    levels = 1 << (spec.bits - 1)
    return bounded_shift(math.floor(math.log2(coarse * levels / low)), spec, two_sided=True)

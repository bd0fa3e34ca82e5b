"""Dynamic focusing quantizer: a clip and a uniform grid (arXiv 2502.04628, eq. 15)."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from fxquant.config.spec import TensorSpec
from fxquant.errors import CalibrationError
from fxquant.quantizers.affine import LEAST_SCALE, AffineQuantizer

_BYTE_MAX = 255


class DynamicFocusingQuantizer(AffineQuantizer):
    """Uniform grid over the interval ``[b1, b2]`` where most of the values lie.

    Values below ``b1`` get code 0, values above ``b2`` the last code; between them codes are
    uniform with step ``scale = (b2 - b1) / (2^bits - 1)``. Here ``b1`` is a whole number of steps,
    ``start``, so that all values lie on one plain grid from zero whose points 8-bit codes number:
    ``value = (start + code) * scale``. A runtime then needs a clip and an ordinary uniform
    quantizer, which run on existing integer kernels. At 8 bits the only possible ``start`` is 0.

    Values below ``b1`` decode to ``b1``, the nearest value of the grid. Decoding them to 0 would
    add a value off the uniform grid, which no clip and no single QDQ pair can express.

    Zero need not be a value of the grid: ``zero_point`` is ``-start``, in ``[2^bits - 256, 0]``.
    ``scale`` and ``zero_point`` have shape ``()``, codes are unsigned.
    """

    type_name: ClassVar[str] = "dynamic_focusing"

    def __init__(self, scale: Tensor, *, start: int, bits: int) -> None:
        """Makes the quantizer.

        Raises:
            CalibrationError: the scale is not finite and positive, or the interval begins below
                zero or ends beyond the codes of 8 bits.
        """
        zero_point = torch.full_like(scale, -float(start))
        super().__init__(scale, zero_point, bits=bits, signed=False, axis=None)
        if not 0 <= start <= largest_start(bits):
            raise CalibrationError(
                f"an interval of {bits}-bit codes starts 0 to {largest_start(bits)} steps above "
                f"zero, got {start}",
                got=start,
                expected=f"0..{largest_start(bits)}",
            )

    @classmethod
    def reaching(cls, top: float, start: int, bits: int) -> DynamicFocusingQuantizer:
        """The quantizer whose interval begins ``start`` steps above zero and ends at ``top``."""
        step = top / (start + (1 << bits) - 1)
        step = step if step > LEAST_SCALE else 1.0  # any scale fits a range of width zero
        return cls(torch.tensor(step, dtype=torch.float32), start=start, bits=bits)

    @classmethod
    def from_range(
        cls, lo: Tensor, hi: Tensor, spec: TensorSpec, axis: int | None
    ) -> DynamicFocusingQuantizer:
        """The quantizer from zero to ``hi``, ``()``, from which the search for ``b1`` starts."""
        assert axis is None, "AssignSpecs assigns this scheme per tensor alone"
        return cls.reaching(float(hi), 0, spec.bits).to(hi.device)

    @property
    def start(self) -> int:
        """Start ``b1`` of the interval, in steps."""
        return -int(self.zero_point)

    @property
    def zero_range(self) -> tuple[int, int]:
        """Smallest and largest ``zero_point``; intervals begin at zero or above it."""
        return -largest_start(self.bits), 0

    @property
    def interval(self) -> tuple[float, float]:
        """Ends ``b1`` and ``b2`` of the interval."""
        step = float(self.scale)
        return self.start * step, (self.start + self.qmax) * step

    def config(self) -> dict[str, object]:
        """Type and bit-width; the buffers hold the start."""
        return {"type": self.type_name, "bits": self.bits}

    @classmethod
    def from_config(cls, config: dict[str, object]) -> DynamicFocusingQuantizer:
        """Rebuilds the module; the caller then loads the buffers from the state dict."""
        return cls(torch.ones(()), start=0, bits=int(config["bits"]))  # type: ignore[call-overload]

    def extra_repr(self) -> str:
        """Bit-width and start."""
        return f"bits={self.bits}, start={self.start}"


def largest_start(bits: int) -> int:
    """The largest ``b1`` in steps with which 8-bit codes number the whole interval."""
    return _BYTE_MAX - ((1 << bits) - 1)

"""The logarithmic quantizer: powers of two, or of a root of two, and zero (arXiv 2407.12951)."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from fxquant.errors import CalibrationError
from fxquant.quantizers import log_ops as ops
from fxquant.quantizers.affine import LEAST_SCALE
from fxquant.quantizers.base import Quantizer

# Entries of the largest table.
_LARGEST_ROOT = 16


class LogQuantizer(Quantizer):
    """Codes ``clamp(round(-(d / n) log2(x / s)), 0, 2^bits - 1)``, each ``n / d`` octaves apart.

    ``n / d = 1`` is the log2 quantizer, other rationals are AdaLog's bases ``2^(n / d)``. A code
    decodes to an entry of a table of ``d`` and a shift (see ``log_ops``).

    The last code stands for zero, not for one more power. Most attention weights are next to
    nothing, and a row has so many of them that reading each as a power that is small but not zero
    moves the sum. Powers stop 16 octaves below the largest; of ``2^bits`` codes those beyond
    ``zero_code`` are never given, which log2 has from 5 bits on.

    Invariants: ``scale`` (``s``) is float32, finite, positive, of shape ``()``; ``n`` and ``d``
    have no common divisor, ``d`` is 16 at most.
    """

    type_name: ClassVar[str] = "log"

    def __init__(self, scale: Tensor, *, bits: int, n: int, d: int) -> None:
        """Makes the quantizer.

        Raises:
            CalibrationError: the parameters break an invariant.
        """
        super().__init__()
        if scale.ndim != 0 or not bool(torch.isfinite(scale) & (scale > 0)):
            raise CalibrationError("the scale of a log quantizer is one finite positive number")
        if n < 1 or not 1 <= d <= _LARGEST_ROOT or math.gcd(n, d) > 1:
            raise CalibrationError(
                f"codes lie n / d octaves apart, in lowest terms and d at most {_LARGEST_ROOT}; "
                f"got {n} / {d}"
            )
        self._bits, self.n, self.d = bits, n, d
        self.register_buffer("scale", scale.detach().float())

    @classmethod
    def reaching(cls, top: float, bits: int, n: int, d: int) -> LogQuantizer:
        """The quantizer whose largest value is ``top``."""
        scale = top if top > LEAST_SCALE else 1.0  # a range of width zero has any scale
        return cls(torch.tensor(scale, dtype=torch.float32), bits=bits, n=n, d=d)

    @property
    def bits(self) -> int:
        """Bit-width of the codes."""
        return self._bits

    @property
    def form(self) -> tuple[int, int, int]:
        """Bit-width, n and d, as the operators take them."""
        return self._bits, self.n, self.d

    @property
    def zero_code(self) -> int:
        """The code of zero, the largest that is given."""
        return ops.log_powers(*self.form)

    @property
    def zero_codes(self) -> Tensor:
        """The code of zero, ``()``."""
        return torch.full_like(self.scale, self.zero_code)

    @property
    def magnitudes(self) -> list[int]:
        """The value of each code up to zero's, in units of :attr:`unit`."""
        return ops.log_magnitudes(*self.form)

    @property
    def unit(self) -> Tensor:
        """What all values are whole multiples of, float32, ``()``."""
        return self.scale / self.magnitudes[0]

    def quantize(self, x: Tensor) -> Tensor:
        """Codes of ``x``: 0 for the largest value, ``zero_code`` for zero."""
        codes: Tensor = ops.log_quantize(x, self.scale, *self.form)
        return codes

    def dequantize(self, codes: Tensor) -> Tensor:
        """Values of ``codes``."""
        values: Tensor = ops.log_dequantize(codes, self.scale, *self.form)
        return values

    def forward(self, x: Tensor) -> Tensor:
        """The values of ``x`` moved to the grid."""
        values: Tensor = ops.log_fake_quantize(x, self.scale, *self.form)
        return values

    def config(self) -> dict[str, object]:
        """Bit-width and the octaves between codes."""
        return {"type": self.type_name, "bits": self._bits, "n": self.n, "d": self.d}

    @classmethod
    def from_config(cls, config: dict[str, object]) -> LogQuantizer:
        """Rebuilds the module; the buffer is then loaded from the state dict."""
        bits, n, d = (int(config[key]) for key in ("bits", "n", "d"))  # type: ignore[call-overload]
        return cls(torch.ones(()), bits=bits, n=n, d=d)

    def extra_repr(self) -> str:
        """Bit-width and the octaves between codes."""
        return f"bits={self._bits}, octaves={self.n}/{self.d}"

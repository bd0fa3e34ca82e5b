"""Logarithmic quantizer: powers of two, or of a root of two, and zero (arXiv 2407.12951)."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from fxquant.errors import CalibrationError
from fxquant.quantizers import log_ops as ops
from fxquant.quantizers.affine import LEAST_SCALE
from fxquant.quantizers.base import Quantizer

# Largest denominator d of the octaves n / d between codes: the entries of the largest table.
_LARGEST_DENOMINATOR = 16


class LogQuantizer(Quantizer):
    """Quantizer with codes ``clamp(round(-(d / n) log2(x / s)), 0, 2^bits - 1)``.

    Neighbouring codes are ``n / d`` octaves apart. ``n / d = 1`` is the log2 quantizer, other
    rationals are AdaLog's bases ``2^(n / d)``. A code decodes to an entry of a table of ``d``
    entries and a shift (see ``log_ops``).

    The last code represents zero, not one more power. Most attention weights are close to zero, and
    a row has so many of them that decoding each to a small power instead of zero would change the
    row's sum. Powers end 16 octaves below the largest; of the ``2^bits`` codes, codes beyond
    ``zero_code`` are never used, which concerns log2 from 5 bits on.

    Invariants: ``scale`` (``s``) is float32, finite, positive, of shape ``()``; ``n`` and ``d``
    have no common divisor; ``d`` is at most 16.
    """

    type_name: ClassVar[str] = "log"

    def __init__(self, scale: Tensor, *, bits: int, n: int, d: int) -> None:
        """Makes the quantizer.

        Raises:
            CalibrationError: the parameters break an invariant.
        """
        super().__init__()
        self._bits, self.n, self.d = bits, n, d
        if scale.ndim != 0 or not bool(torch.isfinite(scale) & (scale > 0)):
            raise CalibrationError(
                "the scale of a log quantizer is one finite positive number",
                got=scale,
                expected="one finite positive number",
            )
        if n < 1 or not 1 <= d <= _LARGEST_DENOMINATOR or math.gcd(n, d) > 1:
            raise CalibrationError(
                f"codes lie n / d octaves apart, in lowest terms and d at most "
                f"{_LARGEST_DENOMINATOR}; got {n} / {d}",
                got=(n, d),
                expected=f"n / d in lowest terms, d at most {_LARGEST_DENOMINATOR}",
            )
        self.register_buffer("scale", scale.detach().float())

    @classmethod
    def reaching(cls, top: float, bits: int, n: int, d: int) -> LogQuantizer:
        """The quantizer whose largest value is ``top``."""
        scale = top if top > LEAST_SCALE else 1.0  # any scale fits a range of width zero
        return cls(torch.tensor(scale, dtype=torch.float32), bits=bits, n=n, d=d)

    @property
    def bits(self) -> int:
        """Bit-width of the codes."""
        return self._bits

    @property
    def form(self) -> tuple[int, int, int]:
        """Bit-width, n and d, in the order of the operators' arguments."""
        return self._bits, self.n, self.d

    @property
    def zero_code(self) -> int:
        """Code of zero, the largest code in use."""
        return ops.log_powers(*self.form)

    @property
    def zero_codes(self) -> Tensor:
        """Code of zero as a tensor, ``()``."""
        return torch.full_like(self.scale, self.zero_code)

    @property
    def magnitudes(self) -> list[int]:
        """Value of each code up to the code of zero, in multiples of :attr:`unit`."""
        return ops.log_magnitudes(*self.form)

    @property
    def unit(self) -> Tensor:
        """Unit of which all values are whole multiples, float32, ``()``."""
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
        """Values of ``x`` rounded to the grid."""
        values: Tensor = ops.log_fake_quantize(x, self.scale, *self.form)
        return values

    def config(self) -> dict[str, object]:
        """Type, bit-width and the octaves between codes."""
        return {"type": self.type_name, "bits": self._bits, "n": self.n, "d": self.d}

    @classmethod
    def from_config(cls, config: dict[str, object]) -> LogQuantizer:
        """Rebuilds the module; the caller then loads the buffer from the state dict."""
        bits, n, d = (int(config[key]) for key in ("bits", "n", "d"))  # type: ignore[call-overload]
        return cls(torch.ones(()), bits=bits, n=n, d=d)

    def extra_repr(self) -> str:
        """Bit-width and the octaves between codes."""
        return f"bits={self._bits}, octaves={self.n}/{self.d}"

"""Base class of all quantizers: a module from floats to floats on a finite grid."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor, nn


class Quantizer(nn.Module, ABC):
    """Fitted quantizer of one edge.

    Laws, tested for every family and every bit-width: codes lie in ``code_range``;
    ``forward(x) == dequantize(quantize(x))``; ``forward`` is idempotent and monotone; the buffers
    and ``config()`` together hold the whole state. A constructor sets what ``extra_repr`` shows
    before it checks arguments, so that a traceback can print the quantizer.
    """

    # Name of the class in saved models.
    type_name: ClassVar[str]
    scale: Tensor

    @abstractmethod
    def quantize(self, x: Tensor) -> Tensor:
        """Codes of ``x``: whole numbers in the dtype and the shape of ``x``."""

    @abstractmethod
    def dequantize(self, codes: Tensor) -> Tensor:
        """Float values of ``codes``, in the shape of ``codes``."""

    @abstractmethod
    def config(self) -> dict[str, object]:
        """Plain JSON values that, together with the buffers, rebuild this quantizer."""

    @classmethod
    @abstractmethod
    def from_config(cls, config: dict[str, object]) -> Quantizer:
        """Rebuilds the module; the caller then loads the buffers from the state dict."""

    @property
    @abstractmethod
    def bits(self) -> int:
        """Bit-width of the codes."""

    @property
    def code_range(self) -> tuple[int, int]:
        """Smallest and largest code, both included."""
        return 0, (1 << self.bits) - 1

    @property
    def scale_axis(self) -> int | None:
        """Axis whose entries have a scale each; None with one scale for the tensor."""
        return None

    @property
    def zero_codes(self) -> Tensor:
        """Code of the value zero for each scale, in the shape of ``scale``."""
        return torch.zeros_like(self.scale)

    @property
    def accumulator_unit(self) -> Tensor | None:
        """Value of one unit of an integer accumulator per unit of the other operand.

        Biases are rounded to multiples of this unit times the scale of the weight. None where the
        values are not whole multiples of one unit on whose grid biases can lie.
        """
        return None

    def fault(self) -> str | None:
        """A clause that names the fault of loaded parameters; None without a fault."""
        broken = ~(self.scale.isfinite() & (self.scale > 0))
        if bool(broken.any()):
            return f"its scale is {float(self.scale[broken][0])}, not positive and finite"
        return None

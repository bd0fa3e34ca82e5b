"""What every quantizer is: a module from floats to floats on a finite grid."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn


class Quantizer(nn.Module, ABC):
    """A fitted quantizer of one edge.

    Laws, tested for every subclass and every bit-width: codes lie in ``code_range``;
    ``forward(x) == dequantize(quantize(x))``; ``forward`` is idempotent and monotone; the state
    is complete in the buffers and ``config()``.
    """

    @abstractmethod
    def quantize(self, x: Tensor) -> Tensor:
        """Codes of ``x``, whole numbers in its dtype, of its shape."""

    @abstractmethod
    def dequantize(self, codes: Tensor) -> Tensor:
        """Float values of ``codes``, of their shape."""

    @abstractmethod
    def config(self) -> dict[str, object]:
        """What, beside the buffers, rebuilds this quantizer; plain JSON values."""

    @property
    @abstractmethod
    def bits(self) -> int:
        """Bit-width of the codes."""

"""Quantizers of activations whose scale and zero point are trained."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from fxquant.ops import broadcast, twin_quantize
from fxquant.quantizers import (
    DynamicFocusingQuantizer,
    Quantizer,
    TwinUniformQuantizer,
    UniformQuantizer,
)
from fxquant.quantizers.dynamic_focusing import largest_start


class LearnedRounding(torch.autograd.Function):
    """``(clamp(round(x / s) + round(z)) - round(z)) s`` with gradients for x, s and z (LSQ+).

    Those of arXiv 1902.08153 and 2004.09576: inside the range rounding counts as the identity.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero: Tensor, qmin: int, qmax: int) -> Tensor:
        """Scale and zero point broadcast against x."""
        steps = x / scale
        zero = zero.round()
        codes = steps.round().add_(zero)
        inside = (codes >= qmin) & (codes <= qmax)
        whole = codes.clamp_(qmin, qmax).sub_(zero)
        ctx.save_for_backward(torch.addcmul(whole, steps, inside, value=-1), inside, scale)
        return whole * scale

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Of x, and of those of s and z that are trained."""
        (grad,) = grads
        by_scale, inside, scale = ctx.saved_tensors
        wants = ctx.needs_input_grad
        inner = grad * inside
        grad_scale = (grad * by_scale).sum_to_size(scale.shape) if wants[1] else None
        grad_zero = ((inner - grad) * scale).sum_to_size(scale.shape) if wants[2] else None
        return inner, grad_scale, grad_zero, None, None


class TrainedQuantizer(nn.Module, ABC):
    """A quantizer of an activation while it is trained.

    Args:
        drop: share of the values left as they are, drawn anew at each call in training mode
            (QDrop, arXiv 2203.05740).
    """

    def __init__(self, drop: float) -> None:
        super().__init__()
        self._drop = drop

    def forward(self, x: Tensor) -> Tensor:
        """Quantizes ``x``, of any shape."""
        rounded = self._rounded(x)
        if not self.training or self._drop == 0:
            return rounded
        return torch.where(torch.rand_like(x) < self._drop, x, rounded)

    @abstractmethod
    def _rounded(self, x: Tensor) -> Tensor:
        """All values on the grid, with gradients."""

    @abstractmethod
    def fitted(self) -> Quantizer:
        """The quantizer as trained by now."""


class TrainedUniform(TrainedQuantizer):
    """A uniform quantizer: scale by its logarithm, zero point as a share of the code range."""

    def __init__(self, start: UniformQuantizer, drop: float) -> None:
        super().__init__(drop)
        self._start = start
        self.log_scale = nn.Parameter(torch.zeros_like(start.scale))
        self.offset = nn.Parameter(torch.zeros_like(start.zero_point), not start.signed)

    def _zero(self) -> Tensor:
        start = self._start
        return start.zero_point + self.offset * (start.qmax - start.qmin)

    def _rounded(self, x: Tensor) -> Tensor:
        start = self._start
        scale = broadcast(start.scale * self.log_scale.exp(), x.ndim, start.axis)
        zero = broadcast(self._zero(), x.ndim, start.axis)
        out: Tensor = LearnedRounding.apply(x, scale, zero, start.qmin, start.qmax)
        return out

    @torch.no_grad()
    def fitted(self) -> UniformQuantizer:
        """See the base class; zero stays on the grid."""
        start = self._start
        zero = self._zero().round().clamp(start.qmin, start.qmax)
        return UniformQuantizer(
            start.scale * self.log_scale.exp(),
            zero,
            bits=start.bits,
            signed=start.signed,
            axis=start.axis,
        )


class TrainedFocusing(TrainedUniform):
    """A dynamic focusing quantizer: both ends of its interval (AIQViT, section 3.4)."""

    def __init__(self, start: DynamicFocusingQuantizer, drop: float) -> None:
        super().__init__(start, drop)
        self._most = largest_start(start.bits)

    def _zero(self) -> Tensor:
        return super()._zero().clamp(-self._most, 0)

    @torch.no_grad()
    def fitted(self) -> DynamicFocusingQuantizer:
        """See the base class."""
        start = self._start
        steps = -int(self._zero().round())
        scale = start.scale * self.log_scale.exp()
        return DynamicFocusingQuantizer(scale, start=steps, bits=start.bits)


class TrainedTwin(TrainedQuantizer):
    """A twin uniform quantizer: its one scale by the logarithm; the shift stays."""

    def __init__(self, start: TwinUniformQuantizer, drop: float) -> None:
        super().__init__(drop)
        self._start = start
        self.log_scale = nn.Parameter(torch.zeros_like(start.scale))

    def _rounded(self, x: Tensor) -> Tensor:
        start = self._start
        most = start.levels - 1
        fine = start.scale * self.log_scale.exp()
        zero = torch.zeros_like(fine)
        low = LearnedRounding.apply(
            x, fine, zero, -most if start.two_sided else 0, 0 if start.two_sided else most
        )
        high = LearnedRounding.apply(x, fine * 2**start.shift, zero, 0, most)
        # The regions are those of the quantizer itself.
        with torch.no_grad():
            words = twin_quantize(x, fine, start.shift, start.bits, start.two_sided)
            coarse = words >= start.levels
        return torch.where(coarse, high, low)

    @torch.no_grad()
    def fitted(self) -> TwinUniformQuantizer:
        """See the base class."""
        start = self._start
        return TwinUniformQuantizer(
            start.scale * self.log_scale.exp(),
            shift=start.shift,
            bits=start.bits,
            two_sided=start.two_sided,
        )


def trained(quantizer: Quantizer, drop: float) -> TrainedQuantizer | None:
    """The form of a quantizer that is trained; None where there is none, as of the log codes."""
    if isinstance(quantizer, DynamicFocusingQuantizer):
        return TrainedFocusing(quantizer, drop)
    if isinstance(quantizer, UniformQuantizer):
        return TrainedUniform(quantizer, drop)
    if isinstance(quantizer, TwinUniformQuantizer):
        return TrainedTwin(quantizer, drop)
    return None

"""Quantizers under training: scale and zero_point as parameters, with gradients."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from fxquant.quantizers.affine import AffineQuantizer
from fxquant.quantizers.base import Quantizer
from fxquant.quantizers.dynamic_focusing import DynamicFocusingQuantizer
from fxquant.quantizers.ops import broadcast, twin_fake_quantize
from fxquant.quantizers.twin_uniform import TwinUniformQuantizer
from fxquant.quantizers.uniform import UniformQuantizer


class _OnGrid(torch.autograd.Function):
    """Replaces ``x`` by values of a grid, with gradients for x, scale s and zero point z (LSQ+).

    Gradients are those of arXiv 1902.08153 and 2004.09576, without the division by the root of the
    number of values, for which Adam makes up: inside the range, rounding counts as the identity.
    Dropped values pass unquantized. Masks are multiplied and have the type of the values, since
    ``torch.where`` and products of two types are far slower.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scale: Tensor,
        zero: Tensor,
        values: Tensor,
        inside: Tensor,
        dropped: Tensor | None,
    ) -> Tensor:
        """Values of the grid, or of x where x is dropped.

        Scale and zero point broadcast against x; ``dropped`` is 1 where x passes unquantized, else
        0, and ``inside`` is 1 within the range of the grid, else 0.
        """
        slope = torch.addcmul(values, x, inside, value=-1)  # s dy/ds
        gate, out = inside, values
        if dropped is not None:
            slope, gate = slope.mul_(1 - dropped), torch.maximum(inside, dropped)
            out = torch.lerp(values, x, dropped)
        ctx.save_for_backward(gate, slope, scale)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, and of s and z where they are trained."""
        (grad,) = grads
        gate, slope, scale = ctx.saved_tensors
        wants = ctx.needs_input_grad
        inner = grad * gate
        grad_scale = _summed_product(grad, slope, scale.shape) / scale if wants[1] else None
        grad_zero = (inner - grad).sum_to_size(scale.shape) * scale if wants[2] else None
        return inner, grad_scale, grad_zero, None, None, None


def _summed_product(a: Tensor, b: Tensor, shape: torch.Size) -> Tensor:
    """Sums the product of two tensors to ``shape``, which broadcasts to the shape of both."""
    if shape.numel() == 1:
        return torch.dot(a.reshape(-1), b.reshape(-1)).view(shape)
    return (a * b).sum_to_size(shape)


def draw_mask(x: Tensor, share: float) -> Tensor:
    """Draws a mask of the shape and dtype of ``x``: 1 at a share of the entries, else 0.

    The share is rounded to 1/256, since a random byte decides on each entry; one random number of
    64 bits decides on eight entries.
    """
    words = torch.empty(-(-x.numel() // 8), dtype=torch.int64, device=x.device)
    random_bytes = words.random_(-(1 << 63), None).view(torch.uint8)[: x.numel()]
    return random_bytes.to(x.dtype).lt_(round(share * 256)).view(x.shape)


class TrainedQuantizer(nn.Module, ABC):
    """Quantizer of an activation under training; the parameter is the logarithm of its scale.

    Args:
        start: the quantizer before training.
        drop: share of the values that pass unquantized, drawn again at each call in training mode
            (QDrop, arXiv 2203.05740).
    """

    def __init__(self, start: Quantizer, drop: float) -> None:
        super().__init__()
        self._first, self._drop = start.scale, drop
        self.log_scale = nn.Parameter(torch.zeros_like(start.scale))

    def forward(self, x: Tensor) -> Tensor:
        """Quantizes ``x``, of any shape, in float32."""
        x = x.float()
        scale, zero = self._grid(x.ndim)
        with torch.no_grad():
            values, inside = self._rounded(x, scale, zero)
            dropped = draw_mask(x, self._drop) if self.training and self._drop else None
        out: Tensor = _OnGrid.apply(x, scale, zero, values, inside, dropped)
        return out

    def _scale(self) -> Tensor:
        return self._first * self.log_scale.exp()

    @abstractmethod
    def _grid(self, ndim: int) -> tuple[Tensor, Tensor]:
        """Scale and zero point with gradients, broadcasting against a tensor of ``ndim`` axes."""

    @abstractmethod
    def _rounded(self, x: Tensor, scale: Tensor, zero: Tensor) -> tuple[Tensor, Tensor]:
        """Values rounded to the grid, and a mask: 1 within the range of the grid, else 0."""

    @abstractmethod
    def fitted(self) -> Quantizer:
        """Makes the quantizer of the parameters trained so far."""


class TrainedAffine(TrainedQuantizer):
    """Quantizer whose zero_point is trained too, as a share of the code range."""

    def __init__(self, start: AffineQuantizer, drop: float) -> None:
        super().__init__(start, drop)
        self._start = start
        self.offset = nn.Parameter(torch.zeros_like(start.zero_point), not start.signed)

    def _zero(self) -> Tensor:
        """Zero_point clamped to its range; the gradient passes the clamp, so that it can return."""
        start = self._start
        unclamped = start.zero_point + self.offset * (start.qmax - start.qmin)
        return unclamped + (unclamped.clamp(*start.zero_range) - unclamped).detach()

    def _grid(self, ndim: int) -> tuple[Tensor, Tensor]:
        axis = self._start.axis
        return broadcast(self._scale(), ndim, axis), broadcast(self._zero(), ndim, axis)

    def _rounded(self, x: Tensor, scale: Tensor, zero: Tensor) -> tuple[Tensor, Tensor]:
        zero = self._start.whole_zero_point(zero)
        codes = (x / scale).round_().add_(zero)
        clamped = codes.clamp(self._start.qmin, self._start.qmax)
        return clamped.sub(zero).mul_(scale), codes.eq_(clamped)


class TrainedUniform(TrainedAffine):
    """Uniform or power-of-two quantizer under training; zero stays a value of the grid."""

    _start: UniformQuantizer

    def _scale(self) -> Tensor:
        return self._start.trained_scale(super()._scale())

    @torch.no_grad()
    def fitted(self) -> UniformQuantizer:
        """Makes the quantizer of the parameters trained so far."""
        return self._start.with_parameters(
            self._scale(), self._start.whole_zero_point(self._zero())
        )


class TrainedFocusing(TrainedAffine):
    """Dynamic focusing quantizer: trains both ends of its interval (AIQViT, section 3.4)."""

    @torch.no_grad()
    def fitted(self) -> DynamicFocusingQuantizer:
        """Makes the quantizer of the interval trained so far."""
        steps = -int(self._zero().round())
        return DynamicFocusingQuantizer(self._scale(), start=steps, bits=self._start.bits)


class TrainedTwin(TrainedQuantizer):
    """Twin uniform quantizer: trains its fine scale; the shift stays."""

    def __init__(self, start: TwinUniformQuantizer, drop: float) -> None:
        super().__init__(start, drop)
        self._start = start

    def _grid(self, ndim: int) -> tuple[Tensor, Tensor]:
        scale = self._scale()
        return scale, torch.zeros_like(scale)

    def _rounded(self, x: Tensor, scale: Tensor, zero: Tensor) -> tuple[Tensor, Tensor]:
        start = self._start
        least = 0.5 - start.levels if start.two_sided else -0.5
        most = (start.levels - 0.5) * 2**start.shift
        values = twin_fake_quantize(x, scale, start.shift, start.bits, start.two_sided)
        steps = x / scale
        return values, steps.clamp(least, most).eq_(steps)

    @torch.no_grad()
    def fitted(self) -> TwinUniformQuantizer:
        """Makes the quantizer of the fine scale trained so far."""
        start = self._start
        return TwinUniformQuantizer(
            self._scale(),
            shift=start.shift,
            bits=start.bits,
            two_sided=start.two_sided,
        )

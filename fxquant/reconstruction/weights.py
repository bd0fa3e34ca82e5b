"""Weights whose rounding is trained.

All count in steps of the quantizer: a weight is ``scale * clamp(round(steps) + zero)``, so that one
learning rate suits layers of any size. The scale of each channel is trained by its logarithm.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from fxquant.quantizers import UniformQuantizer
from fxquant.quantizers.ops import broadcast

# Ends that the rectified sigmoid is stretched to, so that it reaches 0 and 1 (arXiv 2004.10568).
_LOW, _HIGH = -0.1, 1.1


class TrainedWeight(nn.Module, ABC):
    """A weight while its rounding is trained.

    Args:
        weight: as it is before rounding, any shape.
        quantizer: of it.
        scales: whether the scale is trained as well.
    """

    def __init__(self, weight: Tensor, quantizer: UniformQuantizer, *, scales: bool) -> None:
        super().__init__()
        self._start = quantizer
        self._axis = quantizer.axis
        self._ndim = weight.ndim
        self.log_scale = nn.Parameter(torch.zeros_like(quantizer.scale), scales)
        self._zero = broadcast(quantizer.zero_point, weight.ndim, quantizer.axis)
        self._first = weight.detach() / broadcast(quantizer.scale, weight.ndim, quantizer.axis)

    def _scale(self) -> Tensor:
        return broadcast(self._unit(), self._ndim, self._axis)

    def _unit(self) -> Tensor:
        """The scale as it is trained now, of the shape of the quantizer's."""
        return self._start.trained_scale(self._start.scale * self.log_scale.exp())

    def forward(self) -> Tensor:
        """The quantized weight, with gradients."""
        steps = self._steps()
        codes = self._whole(steps) + self._zero
        return (codes.clamp(self._start.qmin, self._start.qmax) - self._zero) * self._scale()

    @abstractmethod
    def _steps(self) -> Tensor:
        """The weight before rounding, in steps, with gradients."""

    def _whole(self, steps: Tensor) -> Tensor:
        """Rounded, the gradient straight through."""
        return steps + (steps.round() - steps).detach()

    def regularizer(self, progress: float) -> Tensor | None:
        """What pushes values to whole numbers; None where nothing need.

        Args:
            progress: share of the training that is over.
        """
        return None

    @torch.no_grad()
    def fitted(self) -> tuple[Tensor, UniformQuantizer]:
        """The weight before rounding and its quantizer, as trained by now."""
        quantizer = self._start.with_parameters(self._unit(), self._start.zero_point)
        return self._steps().round() * self._scale(), quantizer


class StraightThrough(TrainedWeight):
    """Every weight is trained, the gradient passing the rounding (arXiv 1308.3432)."""

    def __init__(self, weight: Tensor, quantizer: UniformQuantizer, *, scales: bool) -> None:
        super().__init__(weight, quantizer, scales=scales)
        self.steps = nn.Parameter(self._first.clone())

    def _steps(self) -> Tensor:
        return self.steps


class FixedCodes(TrainedWeight):
    """The codes stay, the scale of each channel is trained: no rounding is in the way."""

    def _steps(self) -> Tensor:
        return self._first.round()


class AdaRound(TrainedWeight):
    """Each weight goes to the whole number above or below it (arXiv 2004.10568).

    A rectified sigmoid between the two is trained; a regularizer drives it to either end.
    """

    def __init__(self, weight: Tensor, quantizer: UniformQuantizer, *, scales: bool) -> None:
        super().__init__(weight, quantizer, scales=scales)
        share = (self._first - self._first.floor()).clamp(1e-4, 1 - 1e-4)
        self.choice = nn.Parameter(torch.logit((share - _LOW) / (_HIGH - _LOW)))

    def _between(self) -> Tensor:
        return (self.choice.sigmoid() * (_HIGH - _LOW) + _LOW).clamp(0, 1)

    def _steps(self) -> Tensor:
        return self._first.floor() + self._between()

    def _whole(self, steps: Tensor) -> Tensor:
        return steps if self.training else steps.round()

    def regularizer(self, progress: float) -> Tensor | None:
        """``mean(1 - |2h - 1|^beta)``, beta from 20 to 2; none in the first fifth."""
        if progress < 0.2:
            return None
        beta = 20 - 18 * (progress - 0.2) / 0.8
        return (1 - (2 * self._between() - 1).abs() ** beta).mean()


class LowRankWeight(TrainedWeight):
    """The weight is moved by a product of two thin factors, then rounded (AIQViT, eq. 9).

    ``Quant(W0 + B A)``: the factors alone are trained; nothing is left of them at run time.

    Args:
        weight: ``(N, K)``, or ``(N, …)``, flattened behind the first axis.
        quantizer: of it.
        scales: whether the scale is trained as well.
        rank: of the product.
        generator: draws the first values of A; B starts at zero.
    """

    def __init__(
        self,
        weight: Tensor,
        quantizer: UniformQuantizer,
        *,
        scales: bool,
        rank: int,
        generator: torch.Generator,
    ) -> None:
        super().__init__(weight, quantizer, scales=scales)
        rows, columns = weight.flatten(1).shape
        first = torch.randn(rank, columns, generator=generator) / columns**0.5
        self.inner = nn.Parameter(first.to(weight.device))
        self.outer = nn.Parameter(torch.zeros(rows, rank, device=weight.device))

    @property
    def rank(self) -> int:
        """Of the product."""
        return len(self.inner)

    def move(self) -> Tensor:
        """What is added to the weight, in steps."""
        return (self.outer @ self.inner).view_as(self._first)

    def _steps(self) -> Tensor:
        return self._first + self.move()

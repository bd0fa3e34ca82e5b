"""Weights whose rounding is trained.

Every form measures a weight in steps of the quantizer, ``scale * clamp(round(steps) + zero)``: in
this way one learning rate suits layers of any size. The logarithm of each channel's scale is
trained.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from fxquant.quantizers import UniformQuantizer
from fxquant.quantizers.ops import broadcast

# Limits of the stretched sigmoid, which is clamped to [0, 1] and reaches both (arXiv 2004.10568).
_SIGMOID_LOW, _SIGMOID_HIGH = -0.1, 1.1


class TrainedWeight(nn.Module, ABC):
    """A weight while its rounding is trained.

    Args:
        weight: the weight before rounding, any shape.
        quantizer: quantizer of the weight.
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
        """The trained scale, of the shape of the quantizer's scale."""
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
        """Rounds to whole steps, with a straight-through gradient."""
        return steps + (steps.round() - steps).detach()

    def regularizer(self, progress: float) -> Tensor | None:
        """A loss that pushes values to whole numbers; None for forms that need none.

        Args:
            progress: share of the training that is done.
        """
        return None

    @torch.no_grad()
    def fitted(self) -> tuple[Tensor, UniformQuantizer]:
        """The trained weight before rounding, and its trained quantizer."""
        quantizer = self._start.with_parameters(self._unit(), self._start.zero_point)
        return self._steps().round() * self._scale(), quantizer


class StraightThrough(TrainedWeight):
    """Trains every weight, with a straight-through gradient of the rounding (arXiv 1308.3432)."""

    def __init__(self, weight: Tensor, quantizer: UniformQuantizer, *, scales: bool) -> None:
        super().__init__(weight, quantizer, scales=scales)
        self.steps = nn.Parameter(self._first.clone())

    def _steps(self) -> Tensor:
        return self.steps


class FixedCodes(TrainedWeight):
    """Trains the scale of each channel with fixed codes, and needs no gradient of a rounding."""

    def _steps(self) -> Tensor:
        return self._first.round()


class AdaRound(TrainedWeight):
    """Rounds each weight to the whole number above or below it (arXiv 2004.10568).

    A rectified sigmoid between the two numbers is trained; a regularizer drives it to 0 or 1.
    """

    def __init__(self, weight: Tensor, quantizer: UniformQuantizer, *, scales: bool) -> None:
        super().__init__(weight, quantizer, scales=scales)
        share = (self._first - self._first.floor()).clamp(1e-4, 1 - 1e-4)
        self.choice = nn.Parameter(
            torch.logit((share - _SIGMOID_LOW) / (_SIGMOID_HIGH - _SIGMOID_LOW))
        )

    def _between(self) -> Tensor:
        return (self.choice.sigmoid() * (_SIGMOID_HIGH - _SIGMOID_LOW) + _SIGMOID_LOW).clamp(0, 1)

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
    """Adds a product of two thin factors to the weight before rounding (AIQViT, eq. 9).

    ``Quant(W0 + B A)``: only the factors are trained; the run time needs no factors.

    Args:
        weight: ``(N, K)``, or ``(N, …)``, flattened after the first axis.
        quantizer: quantizer of the weight.
        scales: whether the scale is trained as well.
        rank: rank of ``B A``.
        generator: draws the initial values of A; B starts at zero.
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
        """Rank of the weight change."""
        return len(self.inner)

    def move(self) -> Tensor:
        """The change of the weight, in steps."""
        return (self.outer @ self.inner).view_as(self._first)

    def _steps(self) -> Tensor:
        return self._first + self.move()

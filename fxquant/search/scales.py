"""Scale searches by output error: the candidate grid of each kind of quantizer.

A *searched* quantizer holds its choice as positions in a grid, quantizes the operand of a product
with many candidates at once, and returns the fitted quantizer in the end.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from fxquant.config.scale_search import Metric, ScaleSearch
from fxquant.config.spec import TensorSpec
from fxquant.quantizers import Quantizer, TwinUniformQuantizer, UniformQuantizer
from fxquant.quantizers.candidates import twin_candidates
from fxquant.search.grid import best_index
from fxquant.search.metrics import Unit
from fxquant.search.product_loss import Consumer, Quantize, along_units, candidate_losses


class Searched(ABC):
    """A quantizer under search."""

    @abstractmethod
    def improve(self, consumers: list[Consumer], search: ScaleSearch, turn: int) -> None:
        """Moves to the candidate of least loss, with the other operands' quantizers held.

        Args:
            consumers: the products that read the operand.
            search: the grid and the metric.
            turn: number of the round, from 0.
        """

    @abstractmethod
    def apply(self, values: Tensor, *, left: bool) -> Tensor:
        """Quantizes an operand ``(S, H, n, K)`` or ``(S, H, K, N)`` with the current choice."""

    @abstractmethod
    def quantizer(self) -> Quantizer:
        """The quantizer of the current choice."""

    @property
    def spec(self) -> TensorSpec | None:
        """The annotation where the choice has another scheme; None where the scheme stays."""
        return None

    @property
    def comparison(self) -> tuple[str, float] | None:
        """The choice in words, and its error over the hand-set rule's; None without a rule."""
        return None


class SearchedUniform(Searched):
    """Searches the ends of a uniform quantizer's range, as shares of the observed range.

    A symmetric quantizer has one share. Both ends of an asymmetric quantizer move together in the
    first round; later rounds move the upper and the lower end in turns.

    Args:
        fitted: quantizer fitted by the observers.
        spec: bit-width and symmetry.
        unit: part of the product that each scale acts on.
        shape: shape of the units, ``()``, ``(H,)`` or ``(H, N)``.
        search: the grid.
    """

    def __init__(
        self,
        fitted: UniformQuantizer,
        spec: TensorSpec,
        unit: Unit,
        shape: tuple[int, ...],
        search: ScaleSearch,
    ) -> None:
        self._fitted, self._spec, self._unit = fitted, spec, unit
        scale, zero = fitted.scale.reshape(shape), fitted.zero_point.reshape(shape)
        self._lo, self._hi = (fitted.qmin - zero) * scale, (fitted.qmax - zero) * scale
        self._shares = torch.linspace(
            search.low, search.high, search.candidates, device=scale.device
        )
        start = int((self._shares - 1).abs().argmin())
        self._shares[start] = 1.0  # the observed range is a candidate
        self._low = torch.full(shape, start, device=scale.device)
        self._high = self._low.clone()

    def improve(self, consumers: list[Consumer], search: ScaleSearch, turn: int) -> None:
        """Searches both ends of the range together in round 0, then one end in each round."""
        together = self._spec.symmetric or turn == 0
        move_low, move_high = together or turn % 2 == 0, together or turn % 2 == 1

        def quantize(values: Tensor, candidates: Tensor, axis: int) -> Tensor:
            low = candidates if move_low else self._low.expand_as(candidates)
            high = candidates if move_high else self._high.expand_as(candidates)
            return self._quantize(values, low, high, axis)

        def evaluate(candidates: Tensor) -> Tensor:
            return candidate_losses(consumers, candidates, quantize, search.metric, self._unit)

        current = self._high if move_high else self._low
        best = best_index(evaluate, len(self._shares), current, search.stride)
        self._low, self._high = best if move_low else self._low, best if move_high else self._high

    def _parameters(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        return self._fitted.affine_parameters(
            self._lo * self._shares[low], self._hi * self._shares[high], self._spec
        )

    def _quantize(self, values: Tensor, low: Tensor, high: Tensor, axis: int) -> Tensor:
        """Values quantized with candidates ``(G, *units)``, which run along a new axis."""
        scale, zero_point = self._parameters(low, high)
        qmin, qmax = self._spec.code_range
        step = along_units(scale, self._unit, axis)
        codes = (values.unsqueeze(axis) / step).round_()
        if self._spec.symmetric:
            return codes.clamp_(qmin, qmax).mul_(step)
        zero = along_units(zero_point, self._unit, axis)
        return codes.add_(zero).clamp_(qmin, qmax).sub_(zero).mul_(step)

    def apply(self, values: Tensor, *, left: bool) -> Tensor:
        """Quantizes with the current range; ``left`` decides on the axis of the units."""
        axis = 2 if left else 3
        low, high = self._low.unsqueeze(0), self._high.unsqueeze(0)
        return self._quantize(values, low, high, axis).squeeze(axis)

    def quantizer(self) -> UniformQuantizer:
        """The uniform quantizer of the current range."""
        scale, zero_point = self._parameters(self._low, self._high)
        count = () if self._fitted.axis is None else (-1,)
        return self._fitted.with_parameters(scale.reshape(count), zero_point.reshape(count))


class SearchedTwin(Searched):
    """Searches the coarse step and the shift of a twin quantizer.

    Two-sided: the coarse step moves on the grid, the fine region just covers the negative values.
    One-sided: the search covers every shift. The operand's sampled range bounds the grid.

    Args:
        fitted: quantizer fitted by the observers; it stays among the candidates.
        spec: bit-width and bound of the shift.
        search: the grid.
        values: sampled values of the operand, any shape.
    """

    def __init__(
        self,
        fitted: TwinUniformQuantizer,
        spec: TensorSpec,
        search: ScaleSearch,
        values: Tensor,
    ) -> None:
        lo, hi = (float(end) for end in values.aminmax())
        shares = torch.linspace(search.low, search.high, search.candidates).tolist()
        self._stride = search.stride if fitted.two_sided else 1
        candidates = twin_candidates(lo, hi, spec, shares if fitted.two_sided else (1.0,))
        start = 0
        if fitted.two_sided != candidates[0].two_sided:
            candidates = [fitted]  # the sampled rows hold no negative value, other rows do
        elif fitted.two_sided:  # takes its place in the grid, so that its neighbours are near it
            start = min(range(len(candidates)), key=lambda i: abs(shares[i] - 1))
            candidates[start] = fitted
        else:
            candidates.insert(0, fitted)
        self._candidates = [q.to(values.device) for q in candidates]
        self._chosen = torch.tensor(start, device=values.device)

    def improve(self, consumers: list[Consumer], search: ScaleSearch, turn: int) -> None:
        """Searches the grid of coarse steps, or all shifts of a one-sided quantizer."""
        candidates = self._candidates
        self._chosen = best_of(candidates, consumers, search.metric, self._chosen, self._stride)

    def apply(self, values: Tensor, *, left: bool) -> Tensor:
        """Quantizes with the current choice; ``left`` makes no difference to a per-tensor scale."""
        quantized: Tensor = self.quantizer()(values)
        return quantized

    def quantizer(self) -> TwinUniformQuantizer:
        """The twin quantizer of the current choice."""
        return self._candidates[int(self._chosen)]


def best_of(
    quantizers: Sequence[Quantizer],
    consumers: list[Consumer],
    metric: Metric,
    current: Tensor,
    stride: int,
) -> Tensor:
    """Index of the quantizer, one for the whole tensor, of least loss (:func:`best_index`)."""
    quantize = stacked(quantizers)

    def evaluate(candidates: Tensor) -> Tensor:
        return candidate_losses(consumers, candidates, quantize, metric, Unit.TENSOR)

    return best_index(evaluate, len(quantizers), current, stride)


def stacked(quantizers: Sequence[Quantizer]) -> Quantize:
    """A function that quantizes with the ``quantizers`` that candidates ``(G,)`` are indices of."""

    def quantize(values: Tensor, candidates: Tensor, axis: int) -> Tensor:
        return torch.stack([quantizers[i](values) for i in candidates.tolist()], axis)

    return quantize

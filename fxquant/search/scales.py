"""The grids that a search of scales walks: what a candidate of each kind of quantizer is.

A *searched* quantizer holds its choice as positions in a grid, quantizes the operand of a product
with many candidates at once, and gives the fitted quantizer in the end.
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
        """Moves to the candidate of least loss, the other operands as they are.

        Args:
            consumers: the products that read the operand.
            search: the grid and the metric.
            turn: number of the round, from 0.
        """

    @abstractmethod
    def apply(self, values: Tensor, *, left: bool) -> Tensor:
        """An operand ``(S, H, n, K)`` or ``(S, H, K, N)``, quantized as chosen now."""

    @abstractmethod
    def quantizer(self) -> Quantizer:
        """The quantizer as chosen now."""

    @property
    def spec(self) -> TensorSpec | None:
        """The annotation of a choice of another scheme; None where the scheme stays."""
        return None

    @property
    def comparison(self) -> tuple[str, float] | None:
        """The choice in words, and its error over that of the hand-set rule; None without one."""
        return None


class SearchedUniform(Searched):
    """The ends of the range, as shares of the range that the observers found.

    A symmetric quantizer has one share. Of an asymmetric one both ends move together in the first
    round, then the upper and the lower one in turns.

    Args:
        fitted: what the observers gave.
        spec: bit-width and symmetry.
        unit: what each scale acts on.
        shape: of the units, ``()``, ``(H,)`` or ``(H, N)``.
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
        self._shares[start] = 1.0  # what the observers found is a candidate
        self._low = torch.full(shape, start, device=scale.device)
        self._high = self._low.clone()

    def improve(self, consumers: list[Consumer], search: ScaleSearch, turn: int) -> None:
        """See the base class."""
        together = self._spec.symmetric or turn == 0
        low, high = together or turn % 2 == 0, together or turn % 2 == 1

        def quantize(values: Tensor, candidates: Tensor, axis: int) -> Tensor:
            ends = candidates if low else self._low.expand_as(candidates)
            tops = candidates if high else self._high.expand_as(candidates)
            return self._quantize(values, ends, tops, axis)

        def evaluate(candidates: Tensor) -> Tensor:
            return candidate_losses(consumers, candidates, quantize, search.metric, self._unit)

        current = self._high if high else self._low
        best = best_index(evaluate, len(self._shares), current, search.stride)
        self._low, self._high = best if low else self._low, best if high else self._high

    def _parameters(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        return self._fitted.affine_parameters(
            self._lo * self._shares[low], self._hi * self._shares[high], self._spec
        )

    def _quantize(self, values: Tensor, low: Tensor, high: Tensor, axis: int) -> Tensor:
        """``values`` with the candidates ``(G, *units)`` along a new axis."""
        scale, zero_point = self._parameters(low, high)
        qmin, qmax = self._spec.code_range
        step = along_units(scale, self._unit, axis)
        codes = (values.unsqueeze(axis) / step).round_()
        if self._spec.symmetric:
            return codes.clamp_(qmin, qmax).mul_(step)
        zero = along_units(zero_point, self._unit, axis)
        return codes.add_(zero).clamp_(qmin, qmax).sub_(zero).mul_(step)

    def apply(self, values: Tensor, *, left: bool) -> Tensor:
        """See the base class."""
        axis = 2 if left else 3
        low, high = self._low.unsqueeze(0), self._high.unsqueeze(0)
        return self._quantize(values, low, high, axis).squeeze(axis)

    def quantizer(self) -> UniformQuantizer:
        """See the base class."""
        scale, zero_point = self._parameters(self._low, self._high)
        count = () if self._fitted.axis is None else (-1,)
        return self._fitted.with_parameters(scale.reshape(count), zero_point.reshape(count))


class SearchedTwin(Searched):
    """The coarse step and the shift of a twin quantizer.

    Two-sided: the coarse step on the grid, the fine one just covering the negative values.
    One-sided: every shift. The operand's own range, as sampled, bounds the grid.

    Args:
        fitted: what the observers gave; stays among the candidates.
        spec: bit-width and bound of the shift.
        search: the grid.
        values: the operand, any shape.
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
        found = twin_candidates(lo, hi, spec, shares if fitted.two_sided else (1.0,))
        start = 0
        if fitted.two_sided != found[0].two_sided:
            found = [fitted]  # the sampled rows hold no negative value, others do
        elif fitted.two_sided:  # stands where the grid has it, so that its neighbours are near it
            start = min(range(len(found)), key=lambda i: abs(shares[i] - 1))
            found[start] = fitted
        else:
            found.insert(0, fitted)
        self._candidates = [q.to(values.device) for q in found]
        self._chosen = torch.tensor(start, device=values.device)

    def improve(self, consumers: list[Consumer], search: ScaleSearch, turn: int) -> None:
        """See the base class."""
        found = self._candidates
        self._chosen = best_of(found, consumers, search.metric, self._chosen, self._stride)

    def apply(self, values: Tensor, *, left: bool) -> Tensor:
        """See the base class."""
        quantized: Tensor = self.quantizer()(values)
        return quantized

    def quantizer(self) -> TwinUniformQuantizer:
        """See the base class."""
        return self._candidates[int(self._chosen)]


def best_of(
    quantizers: Sequence[Quantizer],
    consumers: list[Consumer],
    metric: Metric,
    current: Tensor,
    stride: int,
) -> Tensor:
    """Position of the quantizer, one for the whole tensor, of least loss: :func:`best_index`."""
    quantize = stacked(quantizers)

    def evaluate(candidates: Tensor) -> Tensor:
        return candidate_losses(consumers, candidates, quantize, metric, Unit.TENSOR)

    return best_index(evaluate, len(quantizers), current, stride)


def stacked(quantizers: Sequence[Quantizer]) -> Quantize:
    """Quantizes with those of ``quantizers`` that the candidates ``(G,)`` number."""

    def quantize(values: Tensor, candidates: Tensor, axis: int) -> Tensor:
        return torch.stack([quantizers[i](values) for i in candidates.tolist()], axis)

    return quantize

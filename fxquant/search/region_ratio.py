"""Search of a twin quantizer's region ratio by output error, OPT-m (arXiv 2401.14895).

A hand-set rule ties the fine step to the coarse step: the fine region just covers GELU's negative
values, and the coarse region of softmax just reaches its largest value. This search evaluates every
ratio ``2^m`` with every coarse step of the grid, and plain uniform grids next to them: with few
bits, a code of the fine region is worth more in the coarse region.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fxquant.config.scale_search import ScaleSearch
from fxquant.config.spec import TensorSpec
from fxquant.quantizers import Quantizer, TwinUniformQuantizer, UniformQuantizer
from fxquant.quantizers.candidates import ratio_candidates
from fxquant.search.metrics import Unit
from fxquant.search.product_loss import Consumer, candidate_losses
from fxquant.search.scales import Searched, SearchedTwin, SearchedUniform, best_of, stacked


class SearchedRegionRatio(Searched):
    """Searches ratio and coarse step of a twin quantizer, or the range of a uniform quantizer.

    The first round evaluates all ratios, later rounds refine the step at the chosen ratio.

    Args:
        fitted: quantizer fitted by the observers.
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
        lo, hi = values.aminmax()
        shares = torch.linspace(search.low, search.high, search.candidates).tolist()
        self._rule = SearchedTwin(fitted, spec, search, values)
        self._steps = search.candidates
        twins = ratio_candidates(float(lo), float(hi), spec, shares, two_sided=fitted.two_sided)
        self._twins = [twin.to(values.device) for twin in twins]
        self._at = torch.zeros((), dtype=torch.long, device=values.device)
        plain = TensorSpec(bits=spec.bits)
        uniform = UniformQuantizer.from_range(lo, hi, plain, None)
        self._uniform = SearchedUniform(uniform, plain, Unit.TENSOR, (), search)
        self._chosen: Quantizer = fitted
        self._error_ratio = 1.0

    def improve(self, consumers: list[Consumer], search: ScaleSearch, turn: int) -> None:
        """Compares the hand-set rule's twin quantizer, the free ratio and a uniform quantizer."""
        self._rule.improve(consumers, search, turn)
        self._uniform.improve(consumers, search, turn)
        first = 0 if turn == 0 else int(self._at) // self._steps * self._steps
        candidates = self._twins[first:] if turn == 0 else self._twins[first : first + self._steps]
        best = best_of(candidates, consumers, search.metric, self._at - first, search.stride)
        self._at = first + best
        finalists: list[Quantizer] = [
            self._rule.quantizer(),
            self._twins[int(self._at)],
            self._uniform.quantizer(),
        ]
        losses = candidate_losses(
            consumers,
            torch.arange(len(finalists), device=self._at.device),
            stacked(finalists),
            search.metric,
            Unit.TENSOR,
        ).tolist()
        self._chosen = finalists[losses.index(min(losses))]
        self._error_ratio = min(losses) / losses[0] if losses[0] else 1.0

    @property
    def spec(self) -> TensorSpec | None:
        """The annotation of the chosen uniform quantizer; None where a twin quantizer is chosen."""
        if isinstance(self._chosen, TwinUniformQuantizer):
            return None
        return TensorSpec(bits=self._chosen.bits)

    @property
    def comparison(self) -> tuple[str, float]:
        """The choice in words, and its error over that of the hand-set rule's best quantizer."""
        if isinstance(self._chosen, TwinUniformQuantizer):
            return f"twin, m = {self._chosen.shift}", self._error_ratio
        return "uniform", self._error_ratio

    def apply(self, values: Tensor, *, left: bool) -> Tensor:
        """Quantizes with the current choice; ``left`` makes no difference to a per-tensor scale."""
        quantized: Tensor = self._chosen(values)
        return quantized

    def quantizer(self) -> Quantizer:
        """The choice among the three kinds."""
        return self._chosen

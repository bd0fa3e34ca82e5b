"""OPT-m: the ratio of the two regions of a twin quantizer, chosen by data (arXiv 2401.14895).

A hand-set rule ties the fine step to the coarse one: it just covers GELU's negative values, and
the coarse step of softmax reaches its largest. Here every ratio ``2^m`` is tried with every coarse
step of the grid, and beside them plain uniform grids: with few bits, a code that the fine region
takes is worth more in the coarse one.
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
    """Ratio and coarse step of a twin quantizer, or the range of a uniform one.

    The first round tries all ratios, later ones refine the step at the ratio found.

    Args:
        fitted: what the observers gave.
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
        """See the base class."""
        self._rule.improve(consumers, search, turn)
        self._uniform.improve(consumers, search, turn)
        first = 0 if turn == 0 else int(self._at) // self._steps * self._steps
        part = self._twins[first:] if turn == 0 else self._twins[first : first + self._steps]
        at = best_of(part, consumers, search.metric, self._at - first, search.stride)
        self._at = first + at
        found: list[Quantizer] = [
            self._rule.quantizer(),
            self._twins[int(self._at)],
            self._uniform.quantizer(),
        ]
        losses = candidate_losses(
            consumers,
            torch.arange(len(found), device=self._at.device),
            stacked(found),
            search.metric,
            Unit.TENSOR,
        ).tolist()
        self._chosen = found[losses.index(min(losses))]
        self._error_ratio = min(losses) / losses[0] if losses[0] else 1.0

    @property
    def spec(self) -> TensorSpec | None:
        """The annotation where a uniform quantizer is chosen, else None."""
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
        """See the base class."""
        quantized: Tensor = self._chosen(values)
        return quantized

    def quantizer(self) -> Quantizer:
        """See the base class."""
        return self._chosen

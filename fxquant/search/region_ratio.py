"""OPT-m: the ratio of the two regions of a twin quantizer, chosen by data (arXiv 2401.14895).

A hand-set rule ties the fine step to the coarse one: it just covers GELU's negative values, and
the coarse step of softmax reaches its largest. Here every ratio ``2^m`` is tried with every coarse
step of the grid, and beside them plain uniform grids: with few bits, a code that the fine region
takes is worth more in the coarse one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fxquant.quantizers import (
    Quantizer,
    TwinUniformQuantizer,
    UniformQuantizer,
    affine_parameters,
    covering_shift,
)
from fxquant.search.grid import best_index
from fxquant.search.metrics import Unit
from fxquant.search.output import Operand, candidate_losses
from fxquant.search.scales import Searched, SearchedTwin, SearchedUniform, stacked
from fxquant.spec import MAX_SHIFT, ScaleSearch, TensorSpec

# Shifts beyond the one that just covers the negative values: each halves what is covered of them.
_BEYOND = 2


class SearchedRatio(Searched):
    """Ratio and coarse step of a twin quantizer, or the range of a uniform one.

    The first round tries all ratios, later ones refine the step at the ratio found.

    Args:
        fitted: what the observers gave.
        spec: bit-width and bound of the shift.
        search: the grid.
        values: the operand, any shape.

    Attributes:
        gain: error of the choice over that of the best quantizer of the hand-set rule.
    """

    def __init__(
        self,
        fitted: TwinUniformQuantizer,
        spec: TensorSpec,
        search: ScaleSearch,
        values: Tensor,
    ) -> None:
        lo, hi = values.aminmax()
        self._rule = SearchedTwin(fitted, spec, search, values)
        self._steps = search.candidates
        self._twins = _grid(
            float(lo), float(hi), spec, search, two_sided=fitted.two_sided, device=values.device
        )
        self._at = torch.zeros((), dtype=torch.long, device=values.device)
        plain = TensorSpec(bits=spec.bits)
        scale, zero_point = affine_parameters(lo, hi, plain)
        uniform = UniformQuantizer(scale, zero_point, bits=spec.bits, signed=False, axis=None)
        self._uniform = SearchedUniform(uniform, plain, Unit.TENSOR, (), search)
        self._chosen: Quantizer = fitted
        self.gain = 1.0

    def improve(self, consumers: list[Operand], search: ScaleSearch, turn: int) -> None:
        """See the base class."""
        self._rule.improve(consumers, search, turn)
        self._uniform.improve(consumers, search, turn)
        first = 0 if turn == 0 else int(self._at) // self._steps * self._steps
        part = self._twins[first:] if turn == 0 else self._twins[first : first + self._steps]

        def evaluate(candidates: Tensor) -> Tensor:
            quantize = stacked(part)
            return candidate_losses(consumers, candidates, quantize, search.metric, Unit.TENSOR)

        self._at = first + best_index(evaluate, len(part), self._at - first, search.stride)
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
        self.gain = min(losses) / losses[0] if losses[0] else 1.0

    @property
    def choice(self) -> str:
        """What is chosen, in words."""
        if isinstance(self._chosen, TwinUniformQuantizer):
            return f"twin, m = {self._chosen.shift}"
        return "uniform"

    def apply(self, values: Tensor, *, left: bool) -> Tensor:
        """See the base class."""
        quantized: Tensor = self._chosen(values)
        return quantized

    def quantizer(self) -> Quantizer:
        """See the base class."""
        return self._chosen


def _grid(
    lo: float,
    hi: float,
    spec: TensorSpec,
    search: ScaleSearch,
    *,
    two_sided: bool,
    device: torch.device,
) -> list[TwinUniformQuantizer]:
    """Twin quantizers, all steps of the least shift first."""
    levels = 1 << (spec.bits - 1)
    largest = MAX_SHIFT if spec.max_shift is None else spec.max_shift
    full = hi / (levels - 1) or 1.0
    if two_sided:
        full = max(full, -lo / levels)
        largest = min(largest, covering_shift(full, max(-lo, full / 2**MAX_SHIFT), spec) + _BEYOND)
    shares = torch.linspace(search.low, search.high, search.candidates).tolist()
    return [
        TwinUniformQuantizer(
            torch.tensor(full * share / 2**shift), shift=shift, bits=spec.bits, two_sided=two_sided
        ).to(device)
        for shift in range(0 if two_sided else 1, largest + 1)
        for share in shares
    ]

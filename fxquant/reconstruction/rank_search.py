"""Differentiable search for the rank of each low-rank weight change (AIQViT, section 3.2).

The changes of all candidate ranks are summed, weighted by the softmax of trained preferences, some
candidates left out at random. Steps alternate: one half of the images trains the factors, the other
half the preferences. After the search the candidate with the largest preference is kept.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fxquant.quantizers import UniformQuantizer
from fxquant.reconstruction.weights import LowRankWeight, TrainedWeight

# Probability that a candidate is left out of a step (drop path).
_DROP_PROBABILITY = 0.2
# Name of the parameter of the preferences.
PREFERENCE = "preference"


class RankSearch(TrainedWeight):
    """A weight whose low-rank change has one of several ranks.

    Args:
        weight: ``(N, …)``, flattened after the first axis.
        quantizer: quantizer of the weight.
        scales: whether the scale is trained as well.
        ranks: the candidates, each at least 1.
        generator: draws initial values.
    """

    def __init__(
        self,
        weight: Tensor,
        quantizer: UniformQuantizer,
        *,
        scales: bool,
        ranks: tuple[int, ...],
        generator: torch.Generator,
    ) -> None:
        super().__init__(weight, quantizer, scales=scales)
        self._candidate_args = (weight, quantizer, scales, generator)
        self.candidates = nn.ModuleList(
            LowRankWeight(weight, quantizer, scales=False, rank=rank, generator=generator)
            for rank in ranks
        )
        self.preference = nn.Parameter(torch.zeros(len(ranks), device=weight.device))

    def _steps(self) -> Tensor:
        shares = self.preference.softmax(0)
        if self.training:
            present = torch.rand(len(shares), device=shares.device) >= _DROP_PROBABILITY
            shares = shares * present / (1 - _DROP_PROBABILITY)
        moves = torch.stack([form.move() for form in self.candidates])  # type: ignore[operator]
        return self._first + torch.einsum("r,r...->...", shares, moves)

    @torch.no_grad()
    def settled(self, rank: int | None = None) -> LowRankWeight:
        """The candidate of a rank, by default the preferred rank, without the other candidates.

        Its factors have their trained values, and its change is multiplied by the softmax of its
        preference, as in training.
        """
        weight, quantizer, scales, generator = self._candidate_args
        ranks = [len(form.inner) for form in self.candidates]  # type: ignore[arg-type]
        position = int(self.preference.argmax()) if rank is None else ranks.index(rank)
        best = self.candidates[position]
        assert isinstance(best, LowRankWeight)
        form = LowRankWeight(weight, quantizer, scales=scales, rank=best.rank, generator=generator)
        form.load_state_dict({**best.state_dict(), "log_scale": self.log_scale})
        form.outer.mul_(self.preference.softmax(0)[position])
        return form


def candidate_ranks(ranks: tuple[int, ...], weight: Tensor) -> tuple[int, ...]:
    """The ranks in ascending order, each limited to half the smaller side of the weight."""
    largest = max(1, min(weight.flatten(1).shape) // 2)
    return tuple(sorted({min(rank, largest) for rank in ranks}))

"""Which rank each low-rank change of a weight gets: a differentiable search (AIQViT, section 3.2).

The changes of all candidate ranks are summed, weighted by the softmax of trained preferences, some
candidates left out at random. Steps on one half of the images train the factors, steps on the other
half the preferences, in turns. In the end the candidate with the largest preference stays.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fxquant.quantizers import UniformQuantizer
from fxquant.reconstruction.weights import LowRankWeight, TrainedWeight

# Chance that a candidate is left out of a step (drop path).
_DROP = 0.2
# Name of the parameter.
PREFERENCE = "preference"


class RankSearch(TrainedWeight):
    """A weight whose low-rank change has one of several ranks.

    Args:
        weight: ``(N, …)``, flattened behind the first axis.
        quantizer: of it.
        scales: whether the scale is trained as well.
        ranks: the candidates, each at least 1.
        generator: draws first values.
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
        self._again = (weight, quantizer, scales, generator)
        self.candidates = nn.ModuleList(
            LowRankWeight(weight, quantizer, scales=False, rank=rank, generator=generator)
            for rank in ranks
        )
        self.preference = nn.Parameter(torch.zeros(len(ranks), device=weight.device))

    def _steps(self) -> Tensor:
        shares = self.preference.softmax(0)
        if self.training:
            present = torch.rand(len(shares), device=shares.device) >= _DROP
            shares = shares * present / (1 - _DROP)
        moves = torch.stack([form.move() for form in self.candidates])  # type: ignore[operator]
        return self._first + torch.einsum("r,r...->...", shares, moves)

    @torch.no_grad()
    def settled(self, rank: int | None = None) -> LowRankWeight:
        """The candidate of a rank, or the preferred one, alone.

        Its factors are as they are trained by now, and its change has the weight of the softmax
        that it was trained with.
        """
        weight, quantizer, scales, generator = self._again
        ranks = [len(form.inner) for form in self.candidates]  # type: ignore[arg-type]
        place = int(self.preference.argmax()) if rank is None else ranks.index(rank)
        best = self.candidates[place]
        assert isinstance(best, LowRankWeight)
        form = LowRankWeight(weight, quantizer, scales=scales, rank=best.rank, generator=generator)
        form.load_state_dict({**best.state_dict(), "log_scale": self.log_scale})
        form.outer.mul_(self.preference.softmax(0)[place])
        return form


def candidate_ranks(ranks: tuple[int, ...], weight: Tensor) -> tuple[int, ...]:
    """The ranks in ascending order, each cut at half the smaller side of the weight."""
    most = max(1, min(weight.flatten(1).shape) // 2)
    return tuple(sorted({min(rank, most) for rank in ranks}))

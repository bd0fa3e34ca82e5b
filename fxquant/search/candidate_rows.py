"""Search over rows of candidate quantizers, such as those of softmax outputs."""

from __future__ import annotations

import torch
from torch import Tensor

from fxquant.config.scale_search import ScaleSearch
from fxquant.config.spec import TensorSpec
from fxquant.quantizers import FAMILIES, Quantizer
from fxquant.search.product_loss import Consumer
from fxquant.search.scales import Searched, best_of


class SearchedRows(Searched):
    """Searches the candidates of a scheme: a row for each start of an interval or base of powers.

    The candidates of a row are for shares of the sampled range, on a geometric grid. The first
    round evaluates every row with every share; later rounds search the share with the row held,
    then the row with the share held.

    Args:
        fitted: quantizer fitted by the observers; it stays among the candidates.
        spec: bit-width and scheme.
        search: the grid.
        values: sampled values of the operand, any shape; their range bounds the candidates.
    """

    def __init__(
        self, fitted: Quantizer, spec: TensorSpec, search: ScaleSearch, values: Tensor
    ) -> None:
        steps = torch.linspace(0, 1, search.candidates).tolist()
        shares = [search.low * (search.high / search.low) ** step for step in steps]
        candidates = FAMILIES[spec.scheme].candidates
        assert candidates is not None, f"{spec.scheme} has no candidates to search"
        lo, hi = (float(end) for end in values.aminmax())
        rows = candidates(lo, hi, spec, shares)
        self._chosen, self._device = fitted, next(fitted.buffers()).device
        self._rows = [[candidate.to(self._device) for candidate in row] for row in rows]
        self._at: tuple[int, int] | None = None

    def improve(self, consumers: list[Consumer], search: ScaleSearch, turn: int) -> None:
        """Searches share and row, each with the other held after the first round."""
        if self._at is None:
            places = [(i, j) for i, row in enumerate(self._rows) for j in range(len(row))]
            self._move(places, consumers, search, search.stride)
            return
        row = self._at[0]
        shares = [(row, j) for j in range(len(self._rows[row]))]
        self._move(shares, consumers, search, search.stride)
        column = self._at[1]
        self._move([(i, column) for i in range(len(self._rows))], consumers, search, 1)

    def _move(
        self,
        places: list[tuple[int, int]],
        consumers: list[Consumer],
        search: ScaleSearch,
        stride: int,
    ) -> None:
        """Chooses among the candidates at ``places`` (row, column) and the current choice."""
        candidates = [self._chosen, *(self._rows[i][j] for i, j in places)]
        start = torch.zeros((), dtype=torch.long, device=self._device)
        best = int(best_of(candidates, consumers, search.metric, start, stride))
        if best:
            self._chosen, self._at = candidates[best], places[best - 1]

    def apply(self, values: Tensor, *, left: bool) -> Tensor:
        """Quantizes with the current choice; ``left`` makes no difference to a per-tensor scale."""
        quantized: Tensor = self._chosen(values)
        return quantized

    def quantizer(self) -> Quantizer:
        """The candidate of least loss."""
        return self._chosen

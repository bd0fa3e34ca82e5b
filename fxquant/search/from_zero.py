"""Candidates of the schemes for values from zero up, such as softmax gives, and their search."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fxquant.quantizers import DynamicFocusingQuantizer, LogQuantizer, Quantizer, largest_start
from fxquant.search.output import Operand
from fxquant.search.scales import Searched, best_of
from fxquant.spec import ScaleSearch, Scheme, TensorSpec

# Octaves from one code of AdaLog to the next, n / d. From 16 to 2 codes for each halving, and half
# a code: with fewer bits codes must reach further. Tables have 16 entries at most.
_OCTAVES = ((1, 16), (1, 8), (1, 6), (1, 4), (1, 3), (1, 2), (2, 3), (3, 4), (1, 1), (3, 2), (2, 1))


def fitted_from_zero(top: float, spec: TensorSpec) -> Quantizer:
    """The quantizer of a scheme from zero to ``top``: where its search begins.

    Args:
        top: largest value wanted.
        spec: bit-width and scheme. AdaLog begins with powers of two.
    """
    if spec.scheme is Scheme.DYNAMIC_FOCUSING:
        return DynamicFocusingQuantizer.reaching(top, 0, spec.bits)
    return LogQuantizer.reaching(top, spec.bits, 1, 1)


def from_zero_candidates(
    top: float, spec: TensorSpec, shares: Sequence[float]
) -> list[list[Quantizer]]:
    """Candidates for values in ``[0, top]``.

    Args:
        top: largest value.
        spec: bit-width and scheme.
        shares: of ``top`` that the largest value of the quantizer is.

    Returns:
        A row for each start of the interval, or base of the powers; in it one for each share.
    """
    ends = [top * share for share in shares]
    if spec.scheme is Scheme.DYNAMIC_FOCUSING:
        return [
            [DynamicFocusingQuantizer.reaching(end, start, spec.bits) for end in ends]
            for start in _starts(spec.bits)
        ]
    octaves = _OCTAVES if spec.scheme is Scheme.ADALOG else ((1, 1),)
    return [[LogQuantizer.reaching(end, spec.bits, n, d) for end in ends] for n, d in octaves]


def _starts(bits: int) -> list[int]:
    """Starts of the interval in steps, each half more than the last, as far as they go."""
    found, start = [0], 1
    while start <= largest_start(bits):
        found.append(start)
        start = max(start + 1, start * 3 // 2)
    return found


class SearchedFromZero(Searched):
    """Upper end and start of an interval, or scale and base of powers.

    The first round tries every start or base with every share of a geometric grid; later ones
    refine the share, then the start or base, each with the other held.

    Args:
        fitted: what the observers gave; stays among the candidates.
        spec: bit-width and scheme.
        search: the grid.
        top: largest value of the operand, as sampled.
    """

    def __init__(
        self, fitted: Quantizer, spec: TensorSpec, search: ScaleSearch, top: float
    ) -> None:
        steps = torch.linspace(0, 1, search.candidates).tolist()
        shares = [search.low * (search.high / search.low) ** step for step in steps]
        rows = from_zero_candidates(top, spec, shares)
        self._chosen, self._device = fitted, next(fitted.buffers()).device
        self._rows = [[candidate.to(self._device) for candidate in row] for row in rows]
        self._at: tuple[int, int] | None = None

    def improve(self, consumers: list[Operand], search: ScaleSearch, turn: int) -> None:
        """See the base class."""
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
        consumers: list[Operand],
        search: ScaleSearch,
        stride: int,
    ) -> None:
        """Chooses among the candidates at ``places`` and the one chosen so far."""
        found = [self._chosen, *(self._rows[i][j] for i, j in places)]
        start = torch.zeros((), dtype=torch.long, device=self._device)
        best = int(best_of(found, consumers, search.metric, start, stride))
        if best:
            self._chosen, self._at = found[best], places[best - 1]

    def apply(self, values: Tensor, *, left: bool) -> Tensor:
        """See the base class."""
        quantized: Tensor = self._chosen(values)
        return quantized

    def quantizer(self) -> Quantizer:
        """See the base class."""
        return self._chosen

"""Greedy allocation: starts at the widest width and lowers widths at the least loss per saving.

Every group starts at the widest width. While the budget is exceeded, the algorithm makes the move
of any group to any lower width with the smallest ``(rise of the loss) / (cost saved)``; the cost
saved is a share of each bound's excess, at most 1 each, summed over the exceeded bounds. In the
end, widths are raised again within the budget where the loss falls most. (MPTQ-ViT, arXiv
2401.14895, names a greedy mixed precision; the algorithm is ours.)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import numpy as np

from fxquant.mixed_precision.allocate.problem import CostFunction, Floats, Ints, Problem, within

# A function of widths, one per group, that returns the loss of the network at these widths.
MeasureLoss: TypeAlias = Callable[[tuple[int, ...]], float]
# A move that is predicted to add less than this share of the whole plan's loss is not measured.
_NEGLIGIBLE_SHARE = 1e-2
# Largest factor by which a measurement changes the predictions of a group.
_MAX_CORRECTION = 2.0


def greedy(
    problem: Problem,
    bounds: list[tuple[CostFunction, int]],
    measure: MeasureLoss | None = None,
    recheck: int = 0,
) -> tuple[int, ...]:
    """Chooses widths within the bounds, one per group.

    Args:
        problem: a problem with at least one solution.
        bounds: cost functions, each with the largest total that it allows.
        measure: measures the loss of a whole plan, for moves in the context of all widths.
        recheck: number of best moves that are measured at each step.
    """
    if measure is None or not recheck:
        return _Descent(problem, bounds).run()
    negligible = _NEGLIGIBLE_SHARE * problem.loss(_Descent(problem, bounds).run())
    return _Measured(problem, bounds, measure, recheck, negligible).run()


class _Descent:
    """A run of the algorithm on predicted losses."""

    def __init__(self, problem: Problem, bounds: list[tuple[CostFunction, int]]) -> None:
        self._problem, self._bounds = problem, bounds
        self._widths = np.array(problem.widths, dtype=np.int64)
        self._bits: Ints = np.full(len(problem.groups), self._widths[-1])
        self._rows = np.arange(len(problem.groups))

    def run(self) -> tuple[int, ...]:
        while not within(self._bounds, self._bits):
            self._lower()
        while self._raise():
            pass
        return tuple(self._bits.tolist())

    def _rises(self) -> Floats:
        """Predicted rise of the loss by each move, ``(G, W)``."""
        losses = self._problem.losses
        columns = np.searchsorted(self._widths, self._bits)
        rises: Floats = losses - losses[self._rows, columns][:, None]
        return rises

    def _savings(self) -> Floats:
        """Share of the excess that each move saves, ``(G, W)``; 0 for moves that save nothing."""
        savings = np.zeros((len(self._bits), len(self._widths)))
        for cost_function, allowed in self._bounds:
            excess = cost_function.total(self._bits) - allowed
            if excess > 0:
                saved = -cost_function.changes(self._bits, self._widths) / excess
                savings += np.clip(saved, 0, 1)
        return savings

    def _lower(self) -> None:
        group, width = self._choose(self._rises(), self._savings())
        self._bits[group] = self._widths[width]

    def _choose(self, rises: Floats, savings: Floats) -> tuple[int, int]:
        """Chooses the next move: its group and width."""
        return _lowest_rate(rises, savings)

    def _raise(self) -> bool:
        """Makes the move to a wider width that lowers the loss most; False without such a move."""
        rises = self._rises()
        allowed = self._widths[None, :] > self._bits[:, None]
        for cost_function, limit in self._bounds:
            allowed &= cost_function.changes(
                self._bits, self._widths
            ) <= limit - cost_function.total(self._bits)
        rises = np.where(allowed, rises, 0.0)
        group, width = divmod(int(rises.argmin()), len(self._widths))
        if rises[group, width] >= 0:
            return False
        self._bits[group] = self._widths[width]
        return True


def _lowest_rate(rises: Floats, savings: Floats) -> tuple[int, int]:
    """The move of the least rise of the loss per cost saved, among moves that save anything."""
    rates = np.where(savings > 0, rises / np.where(savings > 0, savings, 1), np.inf)
    group, width = divmod(int(rates.argmin()), rates.shape[1])
    return group, width


class _Measured(_Descent):
    """Greedy descent that measures its best moves again, other groups at their current widths.

    The ratio of the measured to the predicted rise then corrects all predictions of the move's
    group, so that a rejected move is not taken at its old rate in the next step.
    """

    def __init__(
        self,
        problem: Problem,
        bounds: list[tuple[CostFunction, int]],
        measure: MeasureLoss,
        recheck: int,
        negligible: float,
    ) -> None:
        super().__init__(problem, bounds)
        self._measure, self._recheck, self._negligible = measure, recheck, negligible
        self._factors = np.ones(len(problem.groups))

    def _choose(self, rises: Floats, savings: Floats) -> tuple[int, int]:
        measured: set[tuple[int, int]] = set()
        while True:
            group, width = best = _lowest_rate(rises * self._factors[:, None], savings)
            rise = rises[best]
            if rise <= self._negligible or best in measured or len(measured) == self._recheck:
                return best
            measured.add(best)
            candidate = self._bits.copy()
            candidate[group] = self._widths[width]
            added = self._loss(candidate) - self._loss(self._bits)
            self._factors[group] = min(max(added / rise, 1 / _MAX_CORRECTION), _MAX_CORRECTION)

    def _loss(self, bits: Ints) -> float:
        return self._measure(tuple(bits.tolist()))

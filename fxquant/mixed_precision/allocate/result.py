"""The result of an allocation of bits, for the report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from rich.table import Table

from fxquant.config.allocation import Cost
from fxquant.mixed_precision.allocate.problem import Floats, Problem


def rank_correlation(one: Sequence[float], two: Sequence[float]) -> float | None:
    """Spearman's rank correlation: Pearson's of the ranks, where tied values have their mean rank.

    Args:
        one: numbers.
        two: equally many numbers.

    Returns:
        A number in -1..1; None where either sequence does not vary.
    """
    ranks = _ranks(one), _ranks(two)
    if len(one) < 2 or not all(np.ptp(r) for r in ranks):
        return None
    return float(np.corrcoef(*ranks)[0, 1])


def _ranks(values: Sequence[float]) -> Floats:
    """Ranks from 1; tied values have the mean of their ranks."""
    _, distinct, counts = np.unique(values, return_inverse=True, return_counts=True)
    means: Floats = np.cumsum(counts) - (counts - 1) / 2
    return means[distinct]


@dataclass(frozen=True, kw_only=True)
class AllocationResult:
    """The chosen widths, with the problem and the losses that they follow from.

    Attributes:
        method: ``exact`` or ``greedy``.
        sensitivity: ``measured`` or ``estimated`` losses.
        images: number of images that losses were measured on; 0 without measurements.
        budget: the bounds of the policy, by name.
        problem: groups with their losses, and costs; a sweep over budgets solves this problem.
        bits: the widths, one per group of the problem.
        loss: predicted rise of the loss, the sum over single groups; a mean over images.
        measured_loss: loss with all groups quantized by trial quantizers; None if not measured.
        costs: each cost of the widths.
        rank_correlation: Spearman's rank correlation of measured and estimated losses over all
            groups and widths; None without either losses.
    """

    method: str
    sensitivity: str
    images: int
    budget: dict[str, float]
    problem: Problem
    bits: tuple[int, ...]
    loss: float
    measured_loss: float | None
    costs: dict[str, float]
    rank_correlation: float | None

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> AllocationResult:
        """Restores a result of ``dataclasses.asdict``, also after a trip through JSON."""
        problem = Problem.from_dict(values["problem"])
        return cls(**{**values, "problem": problem, "bits": tuple(values["bits"])})

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

    def table(self) -> Table:
        """Table of groups: edges, values, width, and the loss at each width."""
        table = Table(
            "group", "edges", "values", "bits", *(f"loss at {w}" for w in self.problem.widths)
        )
        for group, bits in zip(self.problem.groups, self.bits, strict=True):
            losses = [f"{loss:.2e}" for loss in group.losses]
            table.add_row(
                group.name, str(len(group.edges)), f"{group.values:,}", str(bits), *losses
            )
        return table

    def summary(self) -> str:
        """Two lines: the budget with the costs, and the predicted and the measured loss."""
        reached = ", ".join(
            f"{name} {self.costs[name]:,.6g} of at most {limit:,.6g}"
            for name, limit in self.budget.items()
        )
        unbounded = ", ".join(
            f"{cost} {self.costs[cost]:,.4g}"
            for cost in Cost
            if cost in self.costs and cost not in self.budget
        )
        measured = "" if self.measured_loss is None else f", measured {self.measured_loss:.3g}"
        ranks = (
            f"; rank correlation of measured and estimated losses {self.rank_correlation:.3f}"
            if self.rank_correlation is not None
            else ""
        )
        on = f" on {self.images} images" if self.images else ""
        return (
            f"widths by {self.method}, {self.sensitivity} sensitivities{on}: {reached} "
            f"({unbounded})\n"
            f"loss predicted {self.loss:.3g}{measured}{ranks}"
        )

"""Common interface of exact and greedy allocation, and the sweep over budgets."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from fxquant.config.allocation import Budget, Cost, Method
from fxquant.mixed_precision.allocate.greedy import MeasureLoss, greedy
from fxquant.mixed_precision.allocate.problem import Problem


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Widths for the groups of a problem.

    Attributes:
        bits: the widths, one for each group.
        loss: predicted loss, the sum of the losses of single groups.
        costs: each cost of the widths.
    """

    bits: tuple[int, ...]
    loss: float
    costs: dict[Cost, float]


def plan_of(problem: Problem, bits: tuple[int, ...]) -> Plan:
    """Widths with their predicted loss and their costs."""
    return Plan(bits=bits, loss=problem.loss(bits), costs=problem.costs(bits))


def allocate(
    problem: Problem,
    budget: Budget,
    method: Method,
    *,
    measure: MeasureLoss | None = None,
    recheck: int = 0,
) -> Plan:
    """Chooses a width for each group.

    Args:
        problem: groups with their losses.
        budget: upper bounds of costs.
        method: exact or greedy.
        measure: measures the loss of a whole plan, by which greedy checks its best moves.
        recheck: number of moves measured at each step; 0 measures no moves.

    Raises:
        PolicyError: the budget cannot be met; the message names the least feasible budget.
    """
    bounds = problem.bounds(budget)
    if not problem.groups:
        return plan_of(problem, ())
    if method is Method.EXACT:
        from fxquant.mixed_precision.allocate.exact import exact  # imports scipy.optimize

        return plan_of(problem, exact(problem, bounds))
    return plan_of(problem, greedy(problem, bounds, measure, recheck))


@dataclass(frozen=True, kw_only=True)
class SweepPoint:
    """A plan of a sweep.

    Attributes:
        method: ``greedy``, ``exact`` or ``uniform``.
        plan: the widths.
    """

    method: str
    plan: Plan


def sweep(problem: Problem, cost: Cost, count: int = 25) -> list[SweepPoint]:
    """Plans from the lowest to the highest cost, all from one set of sensitivities.

    The sweep has a uniform plan at every width, and greedy and exact plans at the cost of each
    uniform plan and at ``count`` costs evenly spaced from the lowest to the highest.

    Args:
        problem: groups with their losses.
        cost: the cost that is bounded.
        count: number of even steps, at least 2.

    Raises:
        PolicyError: the problem has no such cost.
    """
    groups = len(problem.groups)
    uniform = [plan_of(problem, (bits,) * groups) for bits in problem.widths]
    problem.cost_function(cost)
    limits = [plan.costs[cost] for plan in uniform]
    limits += np.linspace(limits[0], limits[-1], count).tolist()
    points = [SweepPoint(method="uniform", plan=plan) for plan in uniform]
    for limit in sorted(set(limits)):
        budget = Budget(**{cost: limit})
        for method in (Method.GREEDY, Method.EXACT):
            points.append(SweepPoint(method=method, plan=allocate(problem, budget, method)))
    return points


def sweep_csv(points: Iterable[SweepPoint]) -> str:
    """CSV text with a row for each plan: method, predicted loss, every cost, widths by group."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["method", "loss", *Cost, "widths"])
    for point in points:
        costs = [point.plan.costs.get(cost, "") for cost in Cost]
        widths = " ".join(map(str, point.plan.bits))
        writer.writerow([point.method, point.plan.loss, *costs, widths])
    return text.getvalue()

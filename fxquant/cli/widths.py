"""Mixed precision on the command line: the budget of ``compile``, the sweep of ``pareto``."""

from __future__ import annotations

import dataclasses
from argparse import Namespace
from functools import partial
from pathlib import Path

from fxquant.cli.arguments import budget_of
from fxquant.compiled.model import load
from fxquant.config.allocation import Allocation, Cost
from fxquant.errors import PolicyError
from fxquant.mixed_precision.allocate.plan import SweepPoint, sweep, sweep_csv
from fxquant.policies.policy import Policy
from fxquant.utils.files import write_together, write_utf8

_BUDGETS = "--mean-bits, --mean-weight-bits, --mean-act-bits, --weight-bytes or --bitops"
CSV_FILE, PLOT_FILE = "pareto.csv", "pareto.png"
_STYLES = {"uniform": "s", "greedy": "o-", "exact": ".-"}


def with_budget(policy: Policy, options: Namespace) -> Policy:
    """The policy with the budget of the command line, if any, instead of its own.

    Raises:
        PolicyError: a bound is not a positive number, or there is a method but no budget.
    """
    budget, allocation = budget_of(options), policy.allocation
    if budget is None and allocation is None:
        if options.allocate is not None:
            raise PolicyError(
                f"--allocate is the method of meeting a budget, and there is none: add {_BUDGETS}"
            )
        return policy
    if budget is not None:
        if allocation is None:
            policy = dataclasses.replace(policy, name=f"{policy.name}_mixed")
        allocation = dataclasses.replace(allocation or Allocation(budget=budget), budget=budget)
    assert allocation is not None
    if options.allocate is not None:
        allocation = dataclasses.replace(allocation, method=options.allocate)
    return dataclasses.replace(policy, allocation=allocation)


def run_pareto(options: Namespace) -> int:
    """``fxquant pareto``: plots loss against cost, from the sensitivities of a saved model."""
    allocation = load(options.path).report.allocation
    if allocation is None:
        raise PolicyError(
            f"{options.path} was compiled without a budget, so it has no sensitivities: compile "
            f"with {_BUDGETS}",
            got=options.path,
        )
    cost = Cost(options.cost)
    points = sweep(allocation.problem, cost, options.steps)
    text = sweep_csv(points)
    write_together(
        {
            options.path / CSV_FILE: lambda path: write_utf8(path, text),
            options.path / PLOT_FILE: partial(_plot, points, cost),
        }
    )
    for point in points:
        if point.method == "uniform":
            cheaper = [p for p in points if p.plan.costs[cost] <= point.plan.costs[cost]]
            best = {m: min(p.plan.loss for p in cheaper if p.method == m) for m in _STYLES}
            losses = ", ".join(f"{method} {loss:.3g}" for method, loss in best.items())
            print(f"{cost} {point.plan.costs[cost]:,.6g}: predicted loss {losses}")
    print(f"wrote {CSV_FILE}, {PLOT_FILE} in {options.path}")
    return 0


def _plot(points: list[SweepPoint], cost: Cost, path: Path) -> None:
    """Plots loss against cost, a line for each method."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.5, 4.5), layout="tight")
    axes = figure.subplots()
    for method, style in _STYLES.items():
        plans = [point.plan for point in points if point.method == method]
        costs, losses = [plan.costs[cost] for plan in plans], [plan.loss for plan in plans]
        axes.plot(costs, losses, style, label=method)
    axes.set(xlabel=cost.replace("_", " "), ylabel="predicted loss", yscale="log")
    axes.legend()
    figure.savefig(path, dpi=120, format="png")

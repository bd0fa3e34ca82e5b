"""Exact allocation: a multiple-choice knapsack as an integer program (HiGHS, by scipy).

One binary variable a group and width, one of them 1 in each group. Where a bound holds products
of two widths (BitOPs), one variable more for each pair of widths of each pair of groups that are
multiplied: ``y_ij >= 0`` with ``sum_j y_ij = x_i`` and ``sum_i y_ij = x_j``, whence ``y_ij = x_i
x_j`` wherever x is whole.
"""

from __future__ import annotations

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, OptimizeResult, milp
from scipy.sparse import coo_array, csr_array, vstack

from fxquant.mixed_precision.allocate.greedy import greedy
from fxquant.mixed_precision.allocate.problem import CostFunction, Floats, Ints, Problem, within

# The solver may exceed a bound by its tolerance; the bound is then lowered by the excess.
_ATTEMPTS = 20


def exact(problem: Problem, bounds: list[tuple[CostFunction, int]]) -> tuple[int, ...]:
    """The widths of least predicted loss within the bounds, one a group.

    Args:
        problem: with at least one solution.
        bounds: cost functions, each with the largest total that it allows.
    """
    plain = greedy(problem, bounds)
    program = _Program(problem, [cost_function for cost_function, _ in bounds], plain)
    limits = [allowed for _, allowed in bounds]
    for _ in range(_ATTEMPTS):
        bits = program.solve(limits)
        if bits is None:
            return plain
        if within(bounds, bits):
            # Within the solver's tolerance of the least loss, the better of the two.
            return min(tuple(bits.tolist()), plain, key=problem.loss)
        for i, (cost_function, allowed) in enumerate(bounds):
            limits[i] -= max(0, cost_function.total(bits) - allowed)
    return plain


class _Program:
    """The integer program of a problem; the limits of its bounds are given to ``solve``.

    Args:
        problem: the problem.
        cost_functions: those of the bounds.
        known: widths within the bounds, whose loss is the unit. A single loss above that of this
            known plan is cut at twice the unit: it would hide all others below the solver's
            tolerances.
    """

    def __init__(
        self, problem: Problem, cost_functions: list[CostFunction], known: tuple[int, ...]
    ) -> None:
        self._problem, self._cost_functions = problem, cost_functions
        self._widths = np.array(problem.widths, dtype=np.int64)
        self._groups, self._choices = len(problem.groups), len(problem.widths)
        pairs = {
            (int(i), int(j))
            for cost_function in cost_functions
            if cost_function.pairs is not None
            for i, j in zip(*np.nonzero(cost_function.pairs), strict=True)
            if i != j
        }
        self._pairs = sorted(pairs)
        least = problem.losses.min(axis=1, keepdims=True)  # each group adds that at any width
        unit = max(problem.loss(known) - float(least.sum()), 1e-300)
        self._objective: Floats = np.minimum((problem.losses - least) / unit, 2.0)
        self._size = self._groups * self._choices + len(self._pairs) * self._choices**2
        self._rows = vstack([self._one_each(), *self._marginals()], format="csr")

    def _row(self, places: Ints, values: Floats) -> csr_array:
        zeros = np.zeros(len(places), dtype=np.int64)
        return coo_array((values, (zeros, places)), shape=(1, self._size)).tocsr()

    def _one_each(self) -> csr_array:
        count = self._groups * self._choices
        rows = np.repeat(np.arange(self._groups), self._choices)
        shape = (self._groups, self._size)
        return coo_array((np.ones(count), (rows, np.arange(count))), shape=shape).tocsr()

    def _block(self, pair: int) -> Ints:
        """Variables of a pair of groups: rows by width of the first, columns of the second."""
        first = self._groups * self._choices + pair * self._choices**2
        block: Ints = first + np.arange(self._choices**2).reshape(self._choices, -1)
        return block

    def _marginals(self) -> list[csr_array]:
        """``sum_j y_ij - x_i = 0`` and ``sum_i y_ij - x_j = 0``, a row each."""
        rows = []
        for number, (one, two) in enumerate(self._pairs):
            block = self._block(number)
            for group, side in ((one, block), (two, block.T)):
                for choice, variables in enumerate(side):
                    places = np.append(variables, group * self._choices + choice)
                    rows.append(self._row(places, np.append(np.ones(self._choices), -1.0)))
        return rows

    def _cost(self, cost_function: CostFunction) -> csr_array:
        """The coefficients of a cost function without its constant."""
        linear = cost_function.linear[:, None] * self._widths[None, :].astype(float)
        if cost_function.pairs is not None:
            linear = linear + np.diag(cost_function.pairs)[:, None] * self._widths[None, :] ** 2
        values = np.zeros(self._size)
        values[: linear.size] = linear.ravel()
        squares = np.outer(self._widths, self._widths)
        for number, (one, two) in enumerate(self._pairs):
            if cost_function.pairs is not None:
                values[self._block(number)] = cost_function.pairs[one, two] * squares
        return csr_array(values[None, :])

    def solve(self, limits: list[int]) -> Ints | None:
        """Widths ``(G,)``; None where the solver finds no solution."""
        count = self._groups * self._choices
        objective = np.zeros(self._size)
        objective[:count] = self._objective.ravel()
        target = np.r_[np.ones(self._groups), np.zeros(self._rows.shape[0] - self._groups)]
        constraints = [LinearConstraint(self._rows, target, target)]
        for cost_function, limit in zip(self._cost_functions, limits, strict=True):
            cost = self._cost(cost_function)
            # Totals near 1000 lie well within what the solver's tolerances are made for.
            size = max(float(cost.sum()), 1.0) / 1000
            most = (limit - cost_function.constant) / size
            constraints.append(LinearConstraint(cost / size, -np.inf, most))
        result: OptimizeResult = milp(
            objective,
            integrality=np.ones(self._size),  # also of y, which branching then finds to be whole
            bounds=Bounds(0, 1),
            constraints=constraints,
            options={"mip_rel_gap": 1e-6},
        )
        if result.x is None:
            return None
        chosen = result.x[:count].reshape(self._groups, -1).argmax(1)
        bits: Ints = self._widths[chosen]
        return bits

"""Exact allocation: a multiple-choice knapsack as an integer program (HiGHS, by scipy).

The program has one binary variable per group and width; exactly one variable of each group is 1.
Where a bound contains products of two widths (BitOPs), it has one more variable for each pair of
widths of each pair of groups that are multiplied: ``y_ij >= 0`` with ``sum_j y_ij = x_i`` and
``sum_i y_ij = x_j``, from which ``y_ij = x_i x_j`` follows where x is whole.
"""

from __future__ import annotations

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, OptimizeResult, milp
from scipy.sparse import coo_array, csr_array, vstack

from fxquant.mixed_precision.allocate.greedy import greedy
from fxquant.mixed_precision.allocate.problem import CostFunction, Floats, Ints, Problem, within
from fxquant.utils.quiet import quiet_c_stdout

# Largest number of solver runs. A solution may exceed a bound by the solver's tolerance; the bound
# is then lowered by the excess for the next run.
_MAX_SOLVES = 20


def exact(problem: Problem, bounds: list[tuple[CostFunction, int]]) -> tuple[int, ...]:
    """The widths of least predicted loss within the bounds, one per group.

    Args:
        problem: a problem with at least one solution.
        bounds: cost functions, each with the largest total that it allows.
    """
    greedy_bits = greedy(problem, bounds)
    program = _Program(problem, [cost_function for cost_function, _ in bounds], greedy_bits)
    limits = [allowed for _, allowed in bounds]
    for _ in range(_MAX_SOLVES):
        bits = program.solve(limits)
        if bits is None:
            return greedy_bits
        if within(bounds, bits):
            # The solver's loss is least up to its tolerance: the greedy widths may be better.
            return min(tuple(bits.tolist()), greedy_bits, key=problem.loss)
        for i, (cost_function, allowed) in enumerate(bounds):
            limits[i] -= max(0, cost_function.total(bits) - allowed)
    return greedy_bits


class _Program:
    """The integer program of a problem; the limits of its bounds are given to ``solve``.

    Args:
        problem: the problem.
        cost_functions: the cost functions of the bounds.
        known: widths within the bounds, whose loss is the unit. A single loss above the loss of
            these widths is clipped to twice the unit: otherwise all other losses would be below
            the solver's tolerances.
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
        least = problem.losses.min(axis=1, keepdims=True)  # each group adds it at any width
        unit = max(problem.loss(known) - float(least.sum()), 1e-300)
        self._objective: Floats = np.minimum((problem.losses - least) / unit, 2.0)
        self._size = self._groups * self._choices + len(self._pairs) * self._choices**2
        self._rows = vstack([self._one_each(), *self._marginals()], format="csr")

    def _row(self, columns: Ints, values: Floats) -> csr_array:
        zeros = np.zeros(len(columns), dtype=np.int64)
        return coo_array((values, (zeros, columns)), shape=(1, self._size)).tocsr()

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
        """Rows of ``sum_j y_ij - x_i = 0`` and of ``sum_i y_ij - x_j = 0``."""
        rows = []
        for number, (first, second) in enumerate(self._pairs):
            block = self._block(number)
            for group, side in ((first, block), (second, block.T)):
                for choice, variables in enumerate(side):
                    columns = np.append(variables, group * self._choices + choice)
                    rows.append(self._row(columns, np.append(np.ones(self._choices), -1.0)))
        return rows

    def _cost(self, cost_function: CostFunction) -> csr_array:
        """The coefficients of a cost function without its constant."""
        linear = cost_function.linear[:, None] * self._widths[None, :].astype(float)
        if cost_function.pairs is not None:
            linear = linear + np.diag(cost_function.pairs)[:, None] * self._widths[None, :] ** 2
        values = np.zeros(self._size)
        values[: linear.size] = linear.ravel()
        squares = np.outer(self._widths, self._widths)
        for number, (first, second) in enumerate(self._pairs):
            if cost_function.pairs is not None:
                values[self._block(number)] = cost_function.pairs[first, second] * squares
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
            # The solver's tolerances are meant for totals of about 1000.
            unit = max(float(cost.sum()), 1.0) / 1000
            upper_bound = (limit - cost_function.constant) / unit
            constraints.append(LinearConstraint(cost / unit, -np.inf, upper_bound))
        with quiet_c_stdout():  # HiGHS 1.12 prints debug lines, whatever option ``disp`` says
            result: OptimizeResult = milp(
                objective,
                integrality=np.ones(self._size),  # also of y, for branching, although y is whole
                bounds=Bounds(0, 1),
                constraints=constraints,
                options={"mip_rel_gap": 1e-6},
            )
        if result.x is None:
            return None
        chosen = result.x[:count].reshape(self._groups, -1).argmax(1)
        bits: Ints = self._widths[chosen]
        return bits

"""The problem of bit allocation in plain numbers: groups, products, and the costs of widths."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fxquant.config.allocation import Budget, Cost
from fxquant.errors import PolicyError

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Group:
    """Edges that must share a width.

    Attributes:
        name: unique name: the name of the first edge.
        edges: names of the edges.
        is_weight: whether the edges are weights, else activations.
        values: number of stored values, of an activation for one image.
        losses: rise of the loss with only this group quantized, one for each of the problem's
            widths.
    """

    name: str
    edges: tuple[str, ...]
    is_weight: bool
    values: int
    losses: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class FixedWidth:
    """A quantizer whose width is fixed.

    Attributes:
        name: name of its first edge.
        is_weight: whether it quantizes a weight, else an activation.
        values: number of stored values, of an activation for one image.
        bits: the fixed width.
    """

    name: str
    is_weight: bool
    values: int
    bits: int


@dataclass(frozen=True, kw_only=True)
class Product:
    """A product of two quantized operands.

    Attributes:
        macs: multiplications for one image.
        left: name of the left operand's group, or its width where that is fixed.
        right: name of the right operand's group, or its width.
    """

    macs: int
    left: str | int
    right: str | int


@dataclass(frozen=True)
class CostFunction:
    """A cost ``constant + linear @ bits + bits @ pairs @ bits`` of widths, in whole numbers.

    Attributes:
        constant: cost of the quantizers whose width is fixed.
        linear: coefficients of the widths, ``(G,)``.
        pairs: coefficients of products of widths, ``(G, G)``, zero below the diagonal; None for a
            linear cost.
        unit: divisor of a total for display.
    """

    constant: int
    linear: Ints
    pairs: Ints | None
    unit: float

    def total(self, bits: Ints) -> int:
        """The cost of widths ``(G,)``."""
        total = self.constant + int(self.linear @ bits)
        return total if self.pairs is None else total + int(bits @ self.pairs @ bits)

    def allowed(self, limit: float) -> int:
        """The largest total whose displayed value is within a limit."""
        total = math.floor(limit * self.unit)
        # The product is rounded: the displayed value of a total decides.
        return next(t for t in (total + 1, total, total - 1) if t / self.unit <= limit)

    def changes(self, bits: Ints, widths: Ints) -> Ints:
        """Change of the cost by each group's move to each width, ``(G, W)``."""
        step = widths[None, :] - bits[:, None]
        if self.pairs is None:
            linear_change: Ints = step * self.linear[:, None]
            return linear_change
        square = np.diag(self.pairs)
        mixed = (self.pairs + self.pairs.T) @ bits - 2 * square * bits
        slope = (self.linear + mixed)[:, None]
        squares = widths[None, :] ** 2 - bits[:, None] ** 2
        change: Ints = step * slope + square[:, None] * squares
        return change


@dataclass(frozen=True, kw_only=True)
class Problem:
    """The widths to choose from, and the groups to choose them for.

    Attributes:
        widths: candidates, ascending.
        groups: groups of edges; each gets one of the widths.
        fixed: quantizers that keep their width.
        products: multiplications of quantized operands.
    """

    widths: tuple[int, ...]
    groups: tuple[Group, ...]
    fixed: tuple[FixedWidth, ...] = ()
    products: tuple[Product, ...] = ()

    def __post_init__(self) -> None:
        """Asserts that groups, widths and products fit together."""
        names = {group.name for group in self.groups}
        assert len(names) == len(self.groups), "names of groups are not unique"
        assert list(self.widths) == sorted(set(self.widths)), "widths are not ascending"
        assert all(len(group.losses) == len(self.widths) for group in self.groups)
        used = {x for p in self.products for x in (p.left, p.right) if isinstance(x, str)}
        assert used <= names, f"products of unknown groups: {used - names}"

    @cached_property
    def losses(self) -> Floats:
        """Losses of all groups at all widths, ``(G, W)``."""
        return np.array([group.losses for group in self.groups], dtype=np.float64)

    @cached_property
    def cost_functions(self) -> dict[Cost, CostFunction]:
        """The cost function of each cost; a mean over no values is left out."""
        size = len(self.groups)
        functions = {Cost.BITOPS: self._bitops()}
        kinds = {
            Cost.MEAN_WEIGHT_BITS: (True,),
            Cost.MEAN_ACT_BITS: (False,),
            Cost.MEAN_BITS: (True, False),
        }
        for cost, counted in kinds.items():
            values = [g.values * (g.is_weight in counted) for g in self.groups]
            fixed = [f for f in self.fixed if f.is_weight in counted]
            constant = sum(f.values * f.bits for f in fixed)
            total = sum(values) + sum(f.values for f in fixed)
            linear = np.array(values, dtype=np.int64).reshape(size)
            if total:
                functions[cost] = CostFunction(constant, linear, None, total)
            if cost is Cost.MEAN_WEIGHT_BITS:
                functions[Cost.WEIGHT_BYTES] = CostFunction(constant, linear, None, 8)
        return functions

    def _bitops(self) -> CostFunction:
        index = {group.name: i for i, group in enumerate(self.groups)}
        constant, size = 0, len(self.groups)
        linear = np.zeros(size, dtype=np.int64)
        pairs = np.zeros((size, size), dtype=np.int64)
        for product in self.products:
            left, right = product.left, product.right
            if isinstance(left, int) and isinstance(right, int):
                constant += product.macs * left * right
            elif isinstance(left, int):
                linear[index[str(right)]] += product.macs * left
            elif isinstance(right, int):
                linear[index[left]] += product.macs * right
            else:
                first, second = sorted((index[left], index[right]))
                pairs[first, second] += product.macs
        return CostFunction(constant, linear, pairs, 1)

    def costs(self, bits: Sequence[int] | Ints) -> dict[Cost, float]:
        """The value of each cost at widths, one width per group."""
        widths = np.asarray(bits, dtype=np.int64)
        return {
            cost: cost_function.total(widths) / cost_function.unit
            for cost, cost_function in self.cost_functions.items()
        }

    def loss(self, bits: Sequence[int] | Ints) -> float:
        """Predicted loss of widths, one per group: the sum of the losses of single groups."""
        columns = np.searchsorted(self.widths, bits)
        return math.fsum(self.losses[np.arange(len(columns)), columns])

    def cost_function(self, cost: Cost) -> CostFunction:
        """The cost function of a cost.

        Raises:
            PolicyError: the cost is a mean over no values.
        """
        if cost not in self.cost_functions:
            raise PolicyError(
                f"{cost} cannot be bounded: the model has no such quantized edge",
                got=cost,
                expected=tuple(self.cost_functions),
            )
        return self.cost_functions[cost]

    def bounds(self, budget: Budget) -> list[tuple[CostFunction, int]]:
        """The cost functions of a budget, each with the largest total that it allows.

        Raises:
            PolicyError: a bound is below the least cost of any widths, which the message names, or
                a bound is on a mean over no values.
        """
        narrow = np.full(len(self.groups), self.widths[0], dtype=np.int64)
        bounds = []
        for cost, limit in budget.limits.items():
            cost_function = self.cost_function(cost)
            allowed, least = cost_function.allowed(limit), cost_function.total(narrow)
            if least > allowed:
                pinned = f" and {len(self.fixed)} pinned at their widths" if self.fixed else ""
                raise PolicyError(
                    f"the budget cannot be met: {cost} is at least "
                    f"{least / cost_function.unit:,.6g}, with every group at {self.widths[0]} "
                    f"bits{pinned}; the budget allows {limit:,.6g}. Raise the budget, or allow "
                    "narrower widths",
                    got=limit,
                    expected=f">= {least / cost_function.unit:.6g}",
                )
            bounds.append((cost_function, allowed))
        return bounds

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Problem:
        """Restores a problem from the values of :meth:`to_dict`, also after a trip through JSON."""
        groups = [
            Group(**{**g, "edges": tuple(g["edges"]), "losses": tuple(g["losses"])})
            for g in values["groups"]
        ]
        return cls(
            widths=tuple(values["widths"]),
            groups=tuple(groups),
            fixed=tuple(FixedWidth(**item) for item in values["fixed"]),
            products=tuple(Product(**item) for item in values["products"]),
        )


def within(bounds: Sequence[tuple[CostFunction, int]], bits: Ints) -> bool:
    """Whether widths satisfy all bounds."""
    return all(cost_function.total(bits) <= allowed for cost_function, allowed in bounds)

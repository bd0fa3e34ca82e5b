"""The pure functions of the scale search: metrics, losses of candidates, the walk over a grid."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fxquant.config.scale_search import GRADIENT_METRICS, Metric
from fxquant.search import product_loss as output
from fxquant.search.grid import best_index
from fxquant.search.metrics import Unit, losses, unit_shape
from fxquant.search.product_loss import Consumer, ProductSample, along_units, candidate_losses

METRICS, UNITS = list(Metric), list(Unit)
SIZES = st.tuples(*[st.integers(1, 3)] * 3, st.integers(1, 4), st.integers(1, 4))


# Metrics


def cells(unit: Unit, heads: int, columns: int) -> Iterator[tuple[tuple[int, ...], slice, slice]]:
    """Index of each unit, and the heads and columns that belong to it."""
    every = slice(None)
    if unit is Unit.TENSOR:
        yield (), every, every
    for head in range(heads if unit is not Unit.TENSOR else 0):
        if unit is Unit.HEAD:
            yield (head,), slice(head, head + 1), every
        for column in range(columns if unit is Unit.COLUMN else 0):
            yield (head, column), slice(head, head + 1), slice(column, column + 1)


def cosine_distance(one: Tensor, two: Tensor) -> float:
    sizes = math.sqrt(sum(float(a) ** 2 for a in one) * sum(float(b) ** 2 for b in two))
    return 1 - sum(float(a) * float(b) for a, b in zip(one, two, strict=True)) / max(sizes, 1e-30)


def loss_of(y: Tensor, target: Tensor, gradient: Tensor, metric: Metric, unit: Unit) -> float:
    """The formulas as a loop; all of shape ``(S, H, n, N)``, the part of one unit."""
    if metric is Metric.COSINE:
        rows = (y.flatten(), target.flatten())
        if unit is Unit.COLUMN:
            return cosine_distance(*rows)
        return sum(
            cosine_distance(a, b)
            for a, b in zip(y.flatten(0, 2), target.flatten(0, 2), strict=True)
        )
    if metric is Metric.FISHER:
        gradient = gradient.square().mean((0, 2), keepdim=True).sqrt().expand_as(target)
    total = 0.0
    for a, b, g in zip(y.flatten(), target.flatten(), gradient.flatten(), strict=True):
        error = float(a) - float(b)
        square = error**2 * (float(g) ** 2 if metric in GRADIENT_METRICS else 1)
        total += abs(error) if metric is Metric.L1 else square
    return total


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("metric", METRICS)
@given(sizes=SIZES, seed=st.integers(0, 999))
def test_each_metric_is_its_formula(
    metric: Metric, unit: Unit, sizes: tuple[int, int, int, int, int], seed: int
) -> None:
    samples, heads, count, rows, columns = sizes
    generator = torch.Generator().manual_seed(seed)
    outputs = torch.randn(samples, heads, count, rows, columns, generator=generator)
    target, gradient = torch.randn(2, samples, heads, rows, columns, generator=generator)
    found = losses(outputs.clone(), target, gradient, metric, unit)
    assert found.shape == (count, *unit_shape(unit, heads, columns))
    for g, (at, h, c) in product(range(count), cells(unit, heads, columns)):
        part = (t[:, h, :, c] for t in (outputs[:, :, g], target, gradient))
        expected = loss_of(*part, metric, unit)
        assert float(found[(g, *at)]) == pytest.approx(expected, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("size", [0.0, 1e-15, 1e15])
def test_cosine_lies_between_0_and_2_whatever_the_size(unit: Unit, size: float) -> None:
    target = torch.randn(2, 2, 4, 3) * size
    close = losses((target * 1.5).unsqueeze(2), target, None, Metric.COSINE, unit)
    far = losses(-target.unsqueeze(2), target, None, Metric.COSINE, unit)
    assert bool((close >= -1e-4).all()) and bool((far >= close).all())
    assert size == 0 or bool((far > close + 1).all())


# Losses of candidates


def sample(
    samples: int = 2, heads: int = 2, rows: int = 5, depth: int = 4, columns: int = 3
) -> ProductSample:
    return ProductSample(
        lhs=torch.randn(samples, heads, rows, depth),
        rhs=torch.randn(samples, heads, depth, columns),
        gradient=torch.randn(samples, heads, rows, columns),
        channels=True,
    )


def rounding(unit: Unit) -> Callable[[Tensor, Tensor, int], Tensor]:
    """Rounds to multiples of a step, ``(candidate + 1) / 4``."""

    def quantize(values: Tensor, candidates: Tensor, axis: int) -> Tensor:
        step = along_units((candidates + 1) / 4, unit, axis)
        return (values.unsqueeze(axis) / step).round() * step

    return quantize


def one_by_one(operand: Consumer, candidates: Tensor, metric: Metric, unit: Unit) -> Tensor:
    """The losses with a plain product for each candidate."""
    given_sample, found = operand.sample, []
    target = given_sample.lhs @ given_sample.rhs
    for candidate in candidates:
        step = (candidate + 1) / 4
        if unit is Unit.HEAD:
            step = step.view(1, -1, 1, 1)
        elif unit is Unit.COLUMN:
            step = step.view(1, step.shape[0], 1, -1)
        tried = (operand.values / step).round() * step
        y = tried @ operand.other if operand.left else operand.other @ tried
        found.append(losses(y.unsqueeze(2), target, given_sample.gradient, metric, unit)[0])
    return torch.stack(found)


@pytest.mark.parametrize("chunk", [1, 100, 1 << 21])
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(
    ("left", "unit"),
    [(True, Unit.TENSOR), (True, Unit.HEAD), *((False, unit) for unit in UNITS)],
)
def test_candidates_together_are_candidates_one_by_one(
    left: bool, unit: Unit, metric: Metric, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(output, "_LARGEST_TEMPORARY", chunk)
    rows = sample()
    other = (rows.rhs if left else rows.lhs).round()
    operand = Consumer(rows, left, other)
    candidates = torch.stack(
        [torch.randint(0, 9, unit_shape(unit, rows.heads, rows.columns)) for _ in range(7)]
    )
    found = candidate_losses([operand], candidates, rounding(unit), metric, unit)
    expected = one_by_one(operand, candidates, metric, unit)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_linear_has_one_weight_for_all_its_rows() -> None:
    rows = sample(samples=1, heads=1)
    operand = Consumer(rows, False, rows.lhs)
    candidates = torch.randint(0, 9, (4, 1, 3))
    found = candidate_losses([operand], candidates, rounding(Unit.COLUMN), Metric.MSE, Unit.COLUMN)
    torch.testing.assert_close(found, one_by_one(operand, candidates, Metric.MSE, Unit.COLUMN))


@pytest.mark.parametrize("metric", METRICS)
def test_the_products_that_read_an_operand_sum(metric: Metric) -> None:
    candidates, quantize = torch.arange(5), rounding(Unit.TENSOR)
    readers = [Consumer(rows, True, rows.rhs) for rows in (sample(), sample(columns=6))]
    both = candidate_losses(readers, candidates, quantize, metric, Unit.TENSOR)
    each = [candidate_losses([r], candidates, quantize, metric, Unit.TENSOR) for r in readers]
    torch.testing.assert_close(both, each[0] + each[1])


def test_a_product_that_the_loss_does_not_reach_weighs_nothing() -> None:
    candidates, quantize = torch.arange(5), rounding(Unit.TENSOR)
    reached, rows = sample(), sample()
    unreached = ProductSample(rows.lhs * 1e3, rows.rhs, None)

    def found(*samples: ProductSample, metric: Metric = Metric.HESSIAN) -> Tensor:
        readers = [Consumer(s, True, s.rhs) for s in samples]
        return candidate_losses(readers, candidates, quantize, metric, Unit.TENSOR)

    assert torch.equal(found(reached, unreached), found(reached))
    assert torch.equal(found(unreached), found(unreached, metric=Metric.MSE))


# The walk over the grid


@st.composite
def tables(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Losses ``(count, units)`` and current positions ``(units,)``."""
    count, units = draw(st.integers(2, 30)), draw(st.integers(1, 4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    table = torch.rand(count, units, generator=generator)
    return table, torch.randint(0, count, (units,), generator=generator)


def looking_up(table: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda candidates: table.gather(0, candidates)


def at(table: Tensor, index: Tensor) -> Tensor:
    return table.gather(0, index.unsqueeze(0))[0]


@given(tables())
def test_stride_1_finds_the_least(case: tuple[Tensor, Tensor]) -> None:
    table, current = case
    found = best_index(looking_up(table), len(table), current, 1)
    assert torch.equal(found, table.argmin(0))


@given(tables(), st.integers(1, 40))
def test_no_stride_makes_it_worse(case: tuple[Tensor, Tensor], stride: int) -> None:
    table, current = case
    found = best_index(looking_up(table), len(table), current, stride)
    assert found.shape == current.shape and found.min() >= 0 and found.max() < len(table)
    assert bool((at(table, found) <= at(table, current)).all())
    assert bool((at(table, found) <= table[::stride].amin(0)).all())


@given(tables(), st.integers(1, 12), st.integers(0, 999))
def test_any_stride_finds_the_least_of_a_valley(
    case: tuple[Tensor, Tensor], stride: int, seed: int
) -> None:
    table, current = case
    generator = torch.Generator().manual_seed(seed)
    bottom = torch.randint(0, len(table), current.shape, generator=generator)
    away = torch.arange(len(table)).unsqueeze(1) - bottom
    slopes = 0.5 + torch.rand(2, len(current), generator=generator)
    valley = torch.where(away < 0, -away * slopes[0], away * slopes[1])
    assert torch.equal(best_index(looking_up(valley), len(table), current, stride), bottom)


@given(tables(), st.integers(1, 12), st.sampled_from([math.nan, math.inf]))
def test_what_overflows_is_never_chosen(
    case: tuple[Tensor, Tensor], stride: int, bad: float
) -> None:
    table, current = case
    table = torch.where(table > 0.5, bad, table).scatter(0, current.unsqueeze(0), 0.5)
    found = best_index(looking_up(table), len(table), current, stride)
    assert bool((at(table, found) <= 0.5).all())


def test_without_any_finite_loss_the_current_stays() -> None:
    current = torch.tensor([3, 0])
    table = torch.full((20, 2), math.nan)
    for stride in (1, 8):
        assert torch.equal(best_index(looking_up(table), 20, current, stride), current)


def test_units_are_searched_each_for_itself() -> None:
    table = torch.rand(20, 3, 4)
    found = best_index(
        lambda c: table.gather(0, c), 20, torch.zeros(3, 4, dtype=torch.long), stride=1
    )
    for i, j in product(range(3), range(4)):
        assert int(found[i, j]) == int(table[:, i, j].argmin())

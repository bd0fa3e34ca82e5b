"""Allocation of bits in plain numbers: greedy, exact, sweeps, and their errors."""

from __future__ import annotations

import csv
import itertools
import json
from dataclasses import asdict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import rankdata, spearmanr

from fxquant.config.allocation import Budget, Cost, Method
from fxquant.errors import PolicyError
from fxquant.mixed_precision.allocate.plan import allocate, sweep, sweep_csv
from fxquant.mixed_precision.allocate.problem import FixedWidth, Group, Problem, Product
from fxquant.mixed_precision.allocate.result import rank_correlation
from tests.helpers.refusals import refused


@st.composite
def problems(draw: st.DrawFn, most: int = 12) -> Problem:
    """Losses need not fall with the width, since measured ones do not always."""
    widths = draw(st.sets(st.integers(2, 8), min_size=1, max_size=4).map(sorted))
    kinds = draw(st.lists(st.booleans(), min_size=1, max_size=most))
    names = [f"g{i}" for i in range(len(kinds))]
    loss = st.floats(0, 10, allow_subnormal=False)
    groups = tuple(
        Group(
            name=name,
            edges=(name,),
            is_weight=is_weight,
            values=draw(st.integers(1, 10**6)),
            losses=tuple(draw(st.lists(loss, min_size=len(widths), max_size=len(widths)))),
        )
        for name, is_weight in zip(names, kinds, strict=True)
    )
    operand = st.sampled_from(names) | st.integers(2, 16)
    product = st.builds(Product, macs=st.integers(1, 10**9), left=operand, right=operand)
    fixed = st.builds(
        FixedWidth,
        name=st.just("image"),
        is_weight=st.booleans(),
        values=st.integers(1, 10**5),
        bits=st.integers(2, 16),
    )
    return Problem(
        widths=tuple(widths),
        groups=groups,
        fixed=tuple(draw(st.lists(fixed, max_size=2))),
        products=tuple(draw(st.lists(product, max_size=8))),
    )


@st.composite
def solvable(draw: st.DrawFn, most: int = 12) -> tuple[Problem, Budget]:
    """A problem, and one or two bounds between the least and the most that it can cost."""
    problem = draw(problems(most))
    ends = [problem.costs([bits] * len(problem.groups)) for bits in (problem.widths[0], 8)]
    offered = [cost for cost, most_of in ends[1].items() if most_of > 0]
    chosen = draw(st.lists(st.sampled_from(offered), min_size=1, max_size=2, unique=True))
    share = st.floats(0, 1)
    limits = {c: ends[0][c] + draw(share) * (ends[1][c] - ends[0][c]) for c in chosen}
    least = {c: max(limit, np.nextafter(ends[0][c], np.inf)) for c, limit in limits.items()}
    return problem, Budget(**least)


@given(given=solvable(), method=st.sampled_from(Method))
def test_a_plan_keeps_the_budget_and_takes_its_widths_from_the_candidates(
    given: tuple[Problem, Budget], method: Method
) -> None:
    problem, budget = given
    plan = allocate(problem, budget, method)
    assert len(plan.bits) == len(problem.groups) and set(plan.bits) <= set(problem.widths)
    assert all(plan.costs[cost] <= limit for cost, limit in budget.limits.items())
    assert plan.loss == problem.loss(plan.bits) and plan.costs == problem.costs(plan.bits)


@given(given=solvable())
def test_exact_is_never_above_greedy(given: tuple[Problem, Budget]) -> None:
    problem, budget = given
    one, two = (allocate(problem, budget, method).loss for method in Method)
    assert one <= two


@given(given=solvable(most=4))
def test_exact_finds_what_brute_force_finds(given: tuple[Problem, Budget]) -> None:
    problem, budget = given
    plans = itertools.product(problem.widths, repeat=len(problem.groups))
    fitting = [
        problem.loss(bits)
        for bits in plans
        if all(problem.costs(bits)[cost] <= limit for cost, limit in budget.limits.items())
    ]
    loss = allocate(problem, budget, Method.EXACT).loss
    assert loss == pytest.approx(min(fitting), rel=1e-5, abs=1e-5)


def group(name: str, *losses: float, values: int = 100, is_weight: bool = True) -> Group:
    return Group(name=name, edges=(name,), is_weight=is_weight, values=values, losses=losses)


def test_costs_are_counted_as_documented() -> None:
    problem = Problem(
        widths=(4, 8),
        groups=(group("w", 1, 0, values=30), group("x", 1, 0, values=10, is_weight=False)),
        fixed=(FixedWidth(name="image", is_weight=False, values=20, bits=8),),
        products=(
            Product(macs=1000, left="x", right="w"),
            Product(macs=10, left=8, right="w"),
            Product(macs=7, left="x", right="x"),
            Product(macs=1, left=8, right=6),
        ),
    )
    assert problem.costs([4, 8]) == {
        Cost.WEIGHT_BYTES: 15.0,
        Cost.BITOPS: 1000 * 32 + 10 * 32 + 7 * 64 + 48,
        Cost.MEAN_WEIGHT_BITS: 4.0,
        Cost.MEAN_ACT_BITS: 8.0,
        Cost.MEAN_BITS: (120 + 80 + 160) / 60,
    }


@given(problem=problems(), data=st.data())
def test_the_change_of_a_move_is_the_difference_of_totals(
    problem: Problem, data: st.DataObject
) -> None:
    width = st.sampled_from(problem.widths)
    size = len(problem.groups)
    bits = np.array(data.draw(st.lists(width, min_size=size, max_size=size)))
    widths = np.array(problem.widths)
    for cost_function in problem.cost_functions.values():
        changes = cost_function.changes(bits, widths)
        for i, j in itertools.product(range(size), range(len(widths))):
            moved = bits.copy()
            moved[i] = widths[j]
            assert changes[i, j] == cost_function.total(moved) - cost_function.total(bits)


@pytest.mark.parametrize("method", Method)
@pytest.mark.parametrize(
    ("budget", "limit", "least", "text"),
    [
        (Budget(weight_bytes=10), 10, ">= 37.5", "weight_bytes is at least 37.5"),
        (Budget(mean_weight_bits=2.5), 2.5, ">= 3", "mean_weight_bits is at least 3"),
        (Budget(bitops=8999), 8999, ">= 9000", "bitops is at least 9,000"),
        (Budget(mean_bits=4, weight_bytes=37), 37, ">= 37.5", "weight_bytes is at least 37.5"),
    ],
)
def test_what_cannot_be_met_raises_with_the_least(
    method: Method, budget: Budget, limit: float, least: str, text: str
) -> None:
    problem = Problem(
        widths=(3, 4),
        groups=(group("w", 1, 0), group("x", 1, 0, is_weight=False)),
        products=(Product(macs=1000, left="x", right="w"),),
    )
    text = f"the budget cannot be met: {text}, with every group"
    with refused(PolicyError, text, got=limit, expected=least):
        allocate(problem, budget, method)


def test_a_mean_over_nothing_cannot_be_bounded() -> None:
    problem = Problem(widths=(4,), groups=(group("w", 1.0),))
    text, costs = "mean_act_bits cannot be bounded", tuple(problem.cost_functions)
    with refused(PolicyError, text, got=Cost.MEAN_ACT_BITS, expected=costs):
        allocate(problem, Budget(mean_act_bits=4), Method.EXACT)
    with refused(PolicyError, got=Cost.MEAN_ACT_BITS, expected=costs):
        sweep(problem, Cost.MEAN_ACT_BITS)


def test_greedy_spends_what_its_last_move_saved_too_much() -> None:
    # The large group is lowered last, which leaves room to raise the small ones again.
    problem = Problem(
        widths=(2, 8),
        groups=(group("large", 0.9, 0, values=1000), group("small", 0.1, 0, values=100)),
    )
    assert allocate(problem, Budget(weight_bytes=950), Method.GREEDY).bits == (2, 8)


def test_greedy_measures_its_best_moves_in_context() -> None:
    """Alone group a matters least; with the others as they are, lowering it ruins the network."""
    problem = Problem(
        widths=(4, 8),
        groups=tuple(group(name, loss, 0.0) for name, loss in [("a", 1), ("b", 1.1), ("c", 5)]),
    )
    asked: list[tuple[int, ...]] = []

    def measure(bits: tuple[int, ...]) -> float:
        asked.append(bits)
        return problem.loss(bits) + 50 * (bits[0] == 4)

    budget = Budget(mean_bits=7)
    assert allocate(problem, budget, Method.GREEDY).bits == (4, 8, 8)
    found = allocate(problem, budget, Method.GREEDY, measure=measure, recheck=2)
    assert found.bits == (8, 4, 8)
    assert set(asked) == {(8, 8, 8), (4, 8, 8), (8, 4, 8)}


@pytest.mark.parametrize("ruin", [1e3, 1e5, 1e9])
def test_one_ruinous_loss_does_not_hide_the_least(ruin: float) -> None:
    """Without it or with it the same plan is the best, since none takes it."""
    generator = np.random.default_rng(0)
    widths = (3, 4, 5, 6, 8)
    plans = np.array(list(itertools.product(range(5), repeat=7)))  # of places among the widths
    for _ in range(20):
        scales = 10 ** generator.uniform(-2, 0, 7)
        losses = scales[:, None] * 4.0 ** -np.arange(5) * generator.uniform(0.7, 1.4, (7, 5))
        losses[0, 0] = ruin
        sizes = generator.integers(1000, 600_000, 7)
        problem = Problem(
            widths=widths,
            groups=tuple(
                group(f"g{i}", *losses[i].tolist(), values=int(sizes[i])) for i in range(7)
            ),
        )
        most = 7 * int(sizes.sum())
        fits = np.array(widths)[plans] @ sizes <= most
        least = losses[np.arange(7), plans[fits]].sum(1).min()
        found = allocate(problem, Budget(mean_weight_bits=7), Method.EXACT)
        assert found.loss == pytest.approx(least, rel=1e-4)


def test_one_measurement_does_not_part_a_group_from_its_prediction() -> None:
    """Ten times what was predicted counts as twice: the group is still the cheapest."""
    problem = Problem(
        widths=(4, 8), groups=tuple(group(f"g{i}", loss, 0.0) for i, loss in enumerate((1, 3)))
    )
    found = allocate(
        problem,
        Budget(mean_weight_bits=6),
        Method.GREEDY,
        measure=lambda bits: 10.0 * (bits[0] == 4) + 3.0 * (bits[1] == 4),
        recheck=2,
    )
    assert found.bits == (4, 8)


def test_losses_of_zero_are_no_number_to_divide_by() -> None:
    problem = Problem(widths=(4, 8), groups=(group("a", 0.0, 0.0), group("b", 0.0, 0.0)))
    asked: list[tuple[int, ...]] = []

    def measure(bits: tuple[int, ...]) -> float:
        asked.append(bits)
        return 0.0

    budget = Budget(mean_weight_bits=6)
    found = allocate(problem, budget, Method.GREEDY, measure=measure, recheck=2)
    assert sorted(found.bits) == [4, 8]
    assert asked == []  # nothing to tell apart


def test_a_sweep_holds_greedy_exact_and_uniform_plans() -> None:
    problem = Problem(
        widths=(2, 4, 8),
        groups=tuple(group(f"g{i}", 3.0 / (i + 1), 1.0 / (i + 1), 0.0) for i in range(6)),
    )
    points = sweep(problem, Cost.WEIGHT_BYTES, count=5)
    by_method: dict[str, list[float]] = {}
    for point in points:
        by_method.setdefault(point.method, []).append(point.plan.loss)
    assert len(by_method["uniform"]) == 3
    assert len(by_method["greedy"]) == len(by_method["exact"]) == 6  # two of the costs coincide
    assert all(a <= b for a, b in zip(by_method["exact"], by_method["greedy"], strict=True))
    uniform = {
        p.plan.costs[Cost.WEIGHT_BYTES]: p.plan.loss for p in points if p.method == "uniform"
    }
    for point in points:
        if point.method == "exact":
            spent = point.plan.costs[Cost.WEIGHT_BYTES]
            within = [loss for cost, loss in uniform.items() if cost <= spent]
            assert point.plan.loss <= min(within)
    rows = list(csv.DictReader(sweep_csv(points).splitlines()))
    assert [row["method"] for row in rows] == [point.method for point in points]
    assert [float(row["loss"]) for row in rows] == [point.plan.loss for point in points]
    assert rows[0]["widths"] == "2 2 2 2 2 2" and rows[0]["mean_act_bits"] == ""


@given(problem=problems())
def test_a_problem_survives_json(problem: Problem) -> None:
    assert Problem.from_dict(json.loads(json.dumps(asdict(problem)))) == problem


@given(st.lists(st.tuples(st.integers(-3, 3), st.floats(-1e9, 1e9)), min_size=2, max_size=30))
def test_rank_correlation_is_scipys(pairs: list[tuple[int, float]]) -> None:
    one, two = ([float(pair[i]) for pair in pairs] for i in (0, 1))
    mine = rank_correlation(one, two)
    if len(set(one)) == 1 or len(set(two)) == 1:
        assert mine is None
    else:
        ranks = rankdata(one), rankdata(two)
        assert mine == float(np.corrcoef(*ranks)[0, 1])  # to the bit
        assert mine == pytest.approx(spearmanr(one, two).statistic, abs=1e-12)


def test_rank_correlation_is_spearmans() -> None:
    assert rank_correlation([1, 2, 3], [10, 100, 1000]) == pytest.approx(1)
    assert rank_correlation([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    assert rank_correlation([1, 2, 2, 4], [1, 3, 2, 4]) == pytest.approx(0.9486832980505138)
    assert rank_correlation([1, 1], [1, 2]) is None and rank_correlation([1], [1]) is None

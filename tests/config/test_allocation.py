"""Options of an allocation and of its budget: wrong values are refused, and named."""

from __future__ import annotations

import math
from typing import Any

import pytest

from fxquant import Policy, Rule, TensorSpec
from fxquant.config.allocation import Allocation, Budget, Cost, Method, Sensitivity
from fxquant.errors import BitWidthError, PolicyError, UnknownKeyError
from tests.helpers.refusals import refused

FOUR = Budget(mean_bits=4)


@pytest.mark.parametrize(
    ("name", "value", "expected", "text"),
    [
        ("method", "best", tuple(Method), "^method must be one of exact, greedy, got 'best'"),
        ("sensitivity", "guessed", tuple(Sensitivity), None),
    ],
)
def test_unknown_options_are_explained(
    name: str, value: str, expected: tuple[str, ...], text: str | None
) -> None:
    with refused(UnknownKeyError, text, got=value, expected=expected):
        Allocation(budget=FOUR, **{name: value})


@pytest.mark.parametrize(
    ("widths", "got", "text"),
    [
        ((4, 9), 9, r"^widths must be whole numbers in 2\.\.8, got 9"),
        ((1, 4), 1, None),
        ((4.0,), 4.0, None),
    ],
)
def test_wrong_widths_are_explained(widths: tuple[int, ...], got: float, text: str | None) -> None:
    with refused(BitWidthError, text, got=got, expected="2..8"):
        Allocation(budget=FOUR, widths=widths)


@pytest.mark.parametrize(
    ("name", "value", "expected", "text"),
    [
        ("widths", (), "a tuple or list of widths", "^widths must be a tuple"),
        ("budget", 4, Budget, "^budget must be a Budget, got 4"),
        ("images", 0, "a whole number >= 1", None),
        ("recheck", -1, "a whole number >= 0", None),
        ("seed", True, "a whole number >= 0", "^seed must be a whole number"),
        ("max_macs", 0.0, "a positive number", "^max_macs must be a positive number, got 0.0"),
        ("max_macs", "much", "a number", None),
    ],
)
def test_wrong_options_are_explained(
    name: str, value: object, expected: object, text: str | None
) -> None:
    with refused(PolicyError, text, got=value, expected=expected):
        Allocation(**{"budget": FOUR, name: value})


def test_an_empty_budget_is_explained() -> None:
    text = "the budget is empty: give at least one of weight_bytes, bitops"
    with refused(PolicyError, text, got=None, expected=tuple(Cost)):
        Budget()


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("mean_bits", 0, None),
        ("bitops", math.nan, None),
        ("weight_bytes", "10 MB", "^weight_bytes must be a positive number or null, got '10 MB'"),
        ("mean_act_bits", True, None),
    ],
)
def test_a_wrong_budget_is_explained(name: str, value: Any, text: str | None) -> None:
    with refused(PolicyError, text, got=value, expected="a positive number or null"):
        Budget(**{name: value})


def test_an_allocation_of_another_type_is_explained() -> None:
    text = "^allocation must be Allocation or None, got 4"
    with refused(PolicyError, text, got=4, expected=(Allocation, None)):
        Policy(name="p", rules=(Rule(spec=TensorSpec()),), allocation=4)  # type: ignore[arg-type]

"""Errors carry the edge and the values that they are about, and keep them in copies."""

from __future__ import annotations

import copy
import inspect

import pytest

from fxquant import errors
from fxquant.errors import CalibrationError, FxQuantError

ERRORS = [
    item
    for _, item in inspect.getmembers(errors, inspect.isclass)
    if issubclass(item, FxQuantError)
]


@pytest.mark.parametrize("error", ERRORS)
def test_fields_are_none_unless_named(error: type[FxQuantError]) -> None:
    plain = error("why")
    assert str(plain) == "why" and plain.args == ("why",)
    assert (plain.edge, plain.got, plain.expected) == (None, None, None)
    full = error("why", edge="fc1__input", got=1, expected="2..16")
    assert str(full) == "why" and full.args == ("why",)
    assert (full.edge, full.got, full.expected) == ("fc1__input", 1, "2..16")


def test_copies_keep_the_fields() -> None:
    """Copies use the same methods as pickling, and represent errors of other processes."""
    error = CalibrationError("fc1__input: why", edge="fc1__input", got=-0.5)
    again = copy.deepcopy(error)
    assert type(again) is CalibrationError and str(again) == "fc1__input: why"
    assert (again.edge, again.got, again.expected) == ("fc1__input", -0.5, None)

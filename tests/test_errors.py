"""Errors carry the edge and the values that they are about, and keep them in copies.

The raise sites of the package are read too: a message that shows the refused value has it as field.
"""

from __future__ import annotations

import ast
import copy
import inspect
import re
from itertools import pairwise
from pathlib import Path

import pytest

import fxquant
from fxquant import errors
from fxquant.errors import CalibrationError, FxQuantError

ERRORS = [
    item
    for _, item in inspect.getmembers(errors, inspect.isclass)
    if issubclass(item, FxQuantError)
]

NAMES = {error.__name__ for error in ERRORS}
SOURCES = sorted(Path(fxquant.__file__).parent.rglob("*.py"))
# The text before a value that a message shows as refused, such as "got shape ".
GOT = re.compile(r"\bgot\b[^.;:]*$")


def shows_got(message: ast.expr) -> bool:
    """Whether a message formats a value after the word "got"; strings side by side are one."""
    f_strings = [node for node in ast.walk(message) if isinstance(node, ast.JoinedStr)]
    return any(
        isinstance(text, ast.Constant)
        and isinstance(value, ast.FormattedValue)
        and GOT.search(str(text.value))
        for f_string in f_strings
        for text, value in pairwise(f_string.values)
    )


def sites_without_got(source: str) -> list[int]:
    """Lines where an error of this package is made whose message has "got {value}", without it."""
    calls = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call))
    return [
        call.lineno
        for call in calls
        if ast.unparse(call.func).rpartition(".")[2] in NAMES
        and call.args
        and shows_got(call.args[0])
        and "got" not in [keyword.arg for keyword in call.keywords]
    ]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_values_that_messages_show_are_fields(path: Path) -> None:
    assert sites_without_got(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("call", "is_wrong"),
    [
        ('PolicyError(f"bits must be in 2..16, got {bits}")', True),
        ('errors.PolicyError(f"a: got {bits!r:.80}; see", expected=4)', True),
        ('BatchError("images must be (B, …), " f"got shape {tuple(x.shape)}")', True),
        ('BatchError("must be text, got " f"{name} and {text}")', True),
        ('PolicyError(f"bits must be in 2..16, got {bits}", got=bits)', False),
        ('PolicyError(f"{edge} got its width. Choose {bits}", edge=edge)', False),
        ('PolicyError(f"{bits} is not what was got")', False),
        ('ValueError(f"got {bits}")', False),
    ],
)
def test_a_site_that_drops_the_value_is_noticed(call: str, is_wrong: bool) -> None:
    assert sites_without_got(f"raise {call}") == ([1] if is_wrong else [])


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

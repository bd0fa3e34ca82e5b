"""Refusals: errors of one class, with fields that are compared instead of the message."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import pytest

from fxquant.errors import FxQuantError

Error = TypeVar("Error", bound=FxQuantError)


@contextmanager
def refused(
    error: type[Error], match: str | None = None, **fields: object
) -> Iterator[pytest.ExceptionInfo[Error]]:
    """Expects an error of exactly this class, with the given fields.

    Args:
        error: class of the error, not one of its bases.
        match: regular expression for the message, in the one test of its text.
        **fields: ``edge``, ``got`` and ``expected``, of the value's own type: True is not 1.
    """
    with pytest.raises(error, match=match) as caught:
        yield caught
    assert type(caught.value) is error
    for name, value in fields.items():
        actual = getattr(caught.value, name)
        # Items of lists are compared by identity first: NaN is the NaN that was passed.
        assert (type(actual), [actual]) == (type(value), [value]), f"{name} is {actual!r}"

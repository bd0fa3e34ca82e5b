"""Checks of the fields of frozen dataclasses, made in ``__post_init__``."""

from __future__ import annotations

import difflib
from enum import StrEnum
from typing import Any

from fxquant.errors import PolicyError, UnknownKeyError

# Largest seed of torch's generators.
_MAX_SEED = 2**63 - 1


def parse_field(item: Any, name: str, enum: type[StrEnum]) -> None:
    """Converts the plain string in a field of a frozen dataclass to its enum.

    Raises:
        UnknownKeyError: the enum has no such value; the message names the nearest.
    """
    value = getattr(item, name)
    if not isinstance(value, str) or value not in list(enum):
        # utils/suggest.py has this for higher floors: config imports errors alone.
        nearest = difflib.get_close_matches(str(value), list(enum), n=1, cutoff=0.5)
        hint = f"; did you mean {str(nearest[0])!r}?" if nearest else ""
        raise UnknownKeyError(
            f"{name} must be one of {', '.join(enum)}, got {value!r}{hint}",
            got=value,
            expected=tuple(enum),
        )
    object.__setattr__(item, name, enum(value))


def check_flag(item: Any, name: str) -> None:
    """Checks that a field is true or false.

    Raises:
        PolicyError: the field has another value, such as the string ``"no"``.
    """
    check_flags(**{name: getattr(item, name)})


def check_flags(**flags: Any) -> None:
    """Checks that keyword arguments are true or false; raises as :func:`check_flag`."""
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise PolicyError(
                f"{name} must be true or false, got {value!r}", got=value, expected=(True, False)
            )


def is_number(value: Any) -> bool:
    """Whether an option is an ``int`` or a ``float``; a boolean is not."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_whole(value: Any) -> bool:
    """Whether an option is an ``int``; a boolean is not."""
    return isinstance(value, int) and not isinstance(value, bool)


def check_number(item: Any, name: str, within: tuple[float, float] | None = None) -> None:
    """Checks that a field is a number and within bounds, where there are bounds.

    Raises:
        PolicyError: the field is not a number, or outside the bounds, as NaN always is.
    """
    value = getattr(item, name)
    if not is_number(value) or (within is not None and not within[0] <= value <= within[1]):
        where = "" if within is None else f" in [{within[0]:g}, {within[1]:g}]"
        raise PolicyError(
            f"{name} must be a number{where}, got {value!r}", got=value, expected=f"a number{where}"
        )


def check_whole(item: Any, name: str, least: int) -> None:
    """Checks that a field is a whole number of at least ``least``.

    Raises:
        PolicyError: the field is not.
    """
    value = getattr(item, name)
    if not is_whole(value) or value < least:
        raise PolicyError(
            f"{name} must be a whole number >= {least}, got {value!r}",
            got=value,
            expected=f"a whole number >= {least}",
        )


def check_seed(item: Any) -> None:
    """Checks that the field ``seed`` is a whole number that torch's generators accept.

    Raises:
        PolicyError: the field is not.
    """
    check_whole(item, "seed", 0)
    if item.seed > _MAX_SEED:
        raise PolicyError(
            f"seed must be at most 2^63 - 1, got {item.seed}",
            got=item.seed,
            expected=f"0..{_MAX_SEED}",
        )

"""Options under new names: the old name is accepted for one minor version, with a warning.

::

    @renamed({"opt_m": "search_region_ratio"})
    @dataclass(frozen=True, kw_only=True)
    class ScaleSearch: ...

accepts ``ScaleSearch(opt_m=True)``, ``dataclasses.replace(search, opt_m=True)`` and
``search.opt_m``. In ``dataclasses.replace``, which passes every field, the old name wins.
"""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from fxquant.errors import PolicyError

T = TypeVar("T")
# Packages between the user's call and the warning; torch wraps ``fxquant.compile``.
_SKIPPED_PACKAGES = ("fxquant", "dataclasses", "torch")
_TABLE = "_new_names"


class RenamedOptionWarning(DeprecationWarning):
    """An option was used under its old name."""


def renamed(new_names: Mapping[str, str]) -> Callable[[type[T]], type[T]]:
    """Class decorator for a dataclass whose fields were renamed.

    Args:
        new_names: the new name of each old one.
    """

    def decorate(cls: type[T]) -> type[T]:
        setattr(cls, _TABLE, dict(new_names))
        _accept_old_keywords(cls, new_names)
        for old, new in new_names.items():
            setattr(cls, old, _old_attribute(cls, old, new))
        return cls

    return decorate


def new_names_of(cls: type) -> Mapping[str, str]:
    """The new name of each old name of a field of a dataclass."""
    table: Mapping[str, str] = getattr(cls, _TABLE, {})
    return table


def warn_renamed(where: str, old: str, new: str) -> None:
    """Warns that an option was used under its old name.

    Args:
        where: place of the use, such as ``mine.yaml:3``; a class name where it is in Python.
        old: the name used.
        new: its new name.
    """
    warnings.warn(
        f"{where}: {old} is now called {new}; use the new name, the old one will be removed in "
        "the next minor version",
        RenamedOptionWarning,
        stacklevel=_user_level(),
    )


def both_names_error(where: str, old: str, new: str) -> PolicyError:
    """The error for an option given under both of its names; arguments as in `warn_renamed`."""
    return PolicyError(f"{where}: {old} is the old name of {new}, and both are given; keep {new}")


def _user_level() -> int:
    """The ``stacklevel`` that makes a warning of :func:`warn_renamed` point at the user's line."""
    level, frame = 0, sys._getframe(1)
    while str(frame.f_globals.get("__name__")).split(".")[0] in _SKIPPED_PACKAGES:
        if frame.f_back is None:
            break
        level, frame = level + 1, frame.f_back
    return level + 1


def _accept_old_keywords(cls: type, new_names: Mapping[str, str]) -> None:
    original: Callable[..., None] = cls.__init__  # type: ignore[misc]

    @functools.wraps(original)
    def initialize(self: Any, *args: Any, **options: Any) -> None:
        # dataclasses.replace passes every field under its new name besides the changes.
        replacing = sys._getframe(1).f_globals.get("__name__") == "dataclasses"
        for old in options.keys() & new_names.keys():
            new = new_names[old]
            if new in options and not replacing:
                raise both_names_error(cls.__name__, old, new)
            warn_renamed(cls.__name__, old, new)
            options[new] = options.pop(old)
        original(self, *args, **options)

    cls.__init__ = initialize  # type: ignore[misc]


def _old_attribute(cls: type, old: str, new: str) -> property:
    def read(self: Any) -> Any:
        warn_renamed(cls.__name__, old, new)
        return getattr(self, new)

    return property(read, doc=f"The old name of ``{new}``.")

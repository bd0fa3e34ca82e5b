"""Options under new names: the old name is accepted for one minor version, with a warning.

::

    @renamed({"opt_m": "search_region_ratio"})
    @dataclass(frozen=True, kw_only=True)
    class ScaleSearch: ...

accepts ``ScaleSearch(opt_m=True)``, ``dataclasses.replace(search, opt_m=True)`` and
``search.opt_m``. Both names together are refused.
"""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import fields
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
        _accept_old_attributes(cls, new_names)
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
    return PolicyError(
        f"{where}: {old} is the old name of {new}, and both are given; keep {new}",
        got=old,
        expected=new,
    )


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
        caller = sys._getframe(1)
        replacing = caller.f_globals.get("__name__") == "dataclasses"
        # The instance that is replaced is a local variable, "obj" before Python 3.13.
        replaced = caller.f_locals.get("obj", caller.f_locals.get("self")) if replacing else None
        for old in options.keys() & new_names.keys():
            new = new_names[old]
            if new in options and not (replacing and _is_copied(options, new, replaced)):
                raise both_names_error(cls.__name__, old, new)
            warn_renamed(cls.__name__, old, new)
            options[new] = options.pop(old)
        original(self, *args, **options)

    cls.__init__ = initialize  # type: ignore[misc]


def _is_copied(options: Mapping[str, Any], name: str, replaced: Any) -> bool:
    """Whether ``dataclasses.replace`` copied a field; False where the user named the field.

    ``replace`` appends the fields that the user did not name, in the order of their definition. A
    field is also taken as copied where the user named it at the place, and with the value, that it
    would have as a copy.

    Args:
        options: keyword arguments that ``replace`` calls the class with.
        name: name of the field.
        replaced: the instance that is replaced.
    """
    names, defined = list(options), [item.name for item in fields(replaced)]
    start = names.index(name)
    return getattr(replaced, name) == options[name] and any(
        names[i:] == [other for other in defined if other not in names[:i]]
        for i in range(start + 1)
    )


def _accept_old_attributes(cls: type, new_names: Mapping[str, str]) -> None:
    # Called for names that an instance does not have, so that dir() does not list old names.
    def read(self: Any, name: str) -> Any:
        if name not in new_names:
            raise AttributeError(f"{cls.__name__!r} object has no attribute {name!r}")
        warn_renamed(cls.__name__, name, new_names[name])
        return getattr(self, new_names[name])

    cls.__getattr__ = read  # type: ignore[attr-defined]

"""Options under their old names: accepted in Python, dicts and YAML, with a warning."""

from __future__ import annotations

import copy
import inspect
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fxquant import Allocation, Budget, Compensation, Policy, Reconstruction, Rule, TensorSpec
from fxquant.config.renamed import RenamedOptionWarning, new_names_of
from fxquant.config.scale_search import ScaleSearch
from fxquant.errors import PolicyError, UnknownKeyError
from fxquant.policies.policy_file import policy_from_dict, read_policy, to_yaml
from tests.helpers.refusals import refused

BUDGET = Budget(mean_bits=4)
RULES = [{"spec": {"bits": 8}}]
# Class, old name, new name, value, other fields, key in a policy file.
CASES: list[tuple[Any, str, str, Any, dict[str, Any], str]] = [
    (ScaleSearch, "opt_m", "search_region_ratio", True, {}, "search"),
    (Compensation, "by_columns", "gptq", False, {"ridge": True}, "compensation"),
    (Reconstruction, "work", "max_macs", 1e9, {"scope": "network"}, "reconstruction"),
    (Allocation, "work", "max_macs", 1e9, {"budget": BUDGET}, "allocation"),
]
cases = pytest.mark.parametrize(
    ("cls", "old", "new", "value", "fields", "key"), CASES, ids=lambda value: None
)


def plain(fields: dict[str, Any]) -> dict[str, Any]:
    """Fields as a policy file has them."""
    return {k: {"mean_bits": 4} if v is BUDGET else v for k, v in fields.items()}


@cases
def test_old_keywords_and_attributes(
    cls: Any, old: str, new: str, value: Any, fields: dict[str, Any], key: str
) -> None:
    wanted = cls(**fields, **{new: value})
    with pytest.warns(RenamedOptionWarning, match=f"{cls.__name__}: {old} is now called {new}"):
        assert cls(**fields, **{old: value}) == wanted
    with pytest.warns(RenamedOptionWarning, match=f"{old} is now called {new}") as caught:
        assert getattr(wanted, old) == value
    assert caught[0].filename == __file__  # the user's line
    with pytest.warns(RenamedOptionWarning, match=f"{old} is now called {new}") as caught:
        assert replace(cls(**fields), **{old: value}) == wanted
    assert caught[0].filename == __file__
    message = f"^{cls.__name__}: {old} is the old name of {new}, and both are given"
    with refused(PolicyError, message, got=old, expected=new):
        cls(**fields, **{old: value, new: value})
    assert new_names_of(cls) == {old: new}


@cases
def test_old_keys_in_dicts(
    cls: Any, old: str, new: str, value: Any, fields: dict[str, Any], key: str
) -> None:
    values = {"rules": RULES, key: {**plain(fields), old: value}}
    with pytest.warns(RenamedOptionWarning, match=rf"{key}\.{old}: {old} is now called {new}"):
        policy = policy_from_dict(values)
    assert getattr(policy, key) == cls(**fields, **{new: value})
    values[key][new] = value
    with refused(PolicyError, rf"{key}\.{old}: ", got=old, expected=new):
        policy_from_dict(values)


@cases
def test_old_keys_in_yaml(
    cls: Any, old: str, new: str, value: Any, fields: dict[str, Any], key: str, tmp_path: Path
) -> None:
    policy = Policy(
        name="p", rules=(Rule(spec=TensorSpec()),), **{key: cls(**fields, **{new: value})}
    )
    path, text = tmp_path / "mine.yaml", to_yaml(policy)
    path.write_text(text)
    assert f"{new}: " in text and read_policy(path) == policy
    path.write_text(text.replace(f"{new}: ", f"{old}: "))
    line = 1 + path.read_text().splitlines().index(f"  {old}: {str(value).lower()}")
    message = rf"mine\.yaml:{line}: {old} is now called {new}"
    with pytest.warns(RenamedOptionWarning, match=message) as caught:
        assert read_policy(path) == policy
    assert caught[0].filename == __file__
    number = str(value).lower()
    path.write_text(text.replace(f"  {new}: ", f"  {old}: {number}\n  {new}: "))
    with refused(PolicyError, rf"mine\.yaml:{line}: ", got=old, expected=new):
        read_policy(path)


@cases
def test_copies_do_not_warn(
    cls: Any, old: str, new: str, value: Any, fields: dict[str, Any], key: str
) -> None:
    item = cls(**fields, **{new: value})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert copy.deepcopy(item) == item == replace(item)
    assert old not in inspect.signature(cls).parameters
    assert new in inspect.signature(cls).parameters


@cases
def test_both_names_in_replace_are_refused(
    cls: Any, old: str, new: str, value: Any, fields: dict[str, Any], key: str
) -> None:
    for item in (cls(**fields), cls(**fields, **{new: value})):
        current = getattr(item, new)
        with refused(PolicyError, got=old, expected=new):
            replace(item, **{new: current, old: value})
        for changes in ({old: current, new: value}, {old: value, new: value}):
            if current != value:
                with refused(PolicyError, got=old, expected=new):
                    replace(item, **changes)
    if new != "gptq":  # the first field, which replace itself would write at the same place
        with refused(PolicyError, got=old, expected=new):
            replace(cls(**fields), **{old: value, new: getattr(cls(**fields), new)})


@cases
def test_an_old_name_next_to_other_changes_is_accepted(
    cls: Any, old: str, new: str, value: Any, fields: dict[str, Any], key: str
) -> None:
    first = next(name for name in inspect.signature(cls).parameters if name != new)
    item = cls(**fields)
    for changes in ({first: getattr(item, first), old: value}, {old: value, **fields}):
        with pytest.warns(RenamedOptionWarning, match=f"{old} is now called {new}"):
            assert replace(item, **changes) == cls(**fields, **{new: value})


@cases
def test_listing_members_does_not_warn(
    cls: Any, old: str, new: str, value: Any, fields: dict[str, Any], key: str
) -> None:
    item = cls(**fields, **{new: value})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        members = dict(inspect.getmembers(item))
    assert old not in members and members[new] == value
    assert old not in dir(item) and not hasattr(item, "other")
    with pytest.raises(AttributeError, match=f"'{cls.__name__}' object has no attribute 'other'"):
        item.other  # noqa: B018


def test_old_names_belong_to_their_class_alone() -> None:
    with refused(UnknownKeyError, got="work"):
        policy_from_dict({"rules": RULES, "search": {"work": 1}})
    with pytest.raises(TypeError, match="opt_m"):
        Compensation(opt_m=True)  # type: ignore[call-arg]

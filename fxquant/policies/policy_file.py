"""Policies as YAML and dicts, with errors that name file and line."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields
from enum import StrEnum
from pathlib import Path
from typing import Any

import yaml

from fxquant import policies
from fxquant.config.allocation import Allocation, Budget, Method, Sensitivity
from fxquant.config.low_rank import LowRank
from fxquant.config.recovery import BlockLoss, Compensation, Reconstruction, Scope, WeightTraining
from fxquant.config.renamed import both_names_error, new_names_of, warn_renamed
from fxquant.config.scale_search import GradientLoss, Metric, ScaleSearch
from fxquant.config.spec import Granularity, ObserverKind, Scheme, TensorSpec
from fxquant.config.vocabulary import Arg, End, OpKind
from fxquant.errors import PolicyError, UnknownKeyError
from fxquant.policies.policy import FLAGS, Policy, Rule
from fxquant.utils.files import as_path, write_text
from fxquant.utils.suggest import did_you_mean

_ENUMS: dict[str, type[StrEnum]] = {
    "op": OpKind,
    "arg": Arg,
    "end": End,
    "scheme": Scheme,
    "granularity": Granularity,
    "observer": ObserverKind,
    "metric": Metric,
    "loss": GradientLoss,
    "method": Method,
    "sensitivity": Sensitivity,
    "scope": Scope,
    "weights": WeightTraining,
    "block_loss": BlockLoss,
    "gradient": GradientLoss,
}
# Parts of a policy whose fields are all plain values.
_PARTS = {
    "search": ScaleSearch,
    "low_rank": LowRank,
    "compensation": Compensation,
    "reconstruction": Reconstruction,
    "dense_reconstruction": Reconstruction,
}
# Place in a file of the fields of each class.
_PLACES: dict[type, str] = {
    Policy: "at the top level",
    **{kind: f"under `{name}:`" for name, kind in _PARTS.items()},
    Reconstruction: "under `reconstruction:` or `dense_reconstruction:`",
    Allocation: "under `allocation:`",
    Budget: "under `budget:` of `allocation:`",
    Rule: "in a rule of `rules:`",
    TensorSpec: "under `spec:` of a rule",
}
# Levels of nesting. A policy needs four: rules, number, spec, bits.
_DEEPEST = 20
_TOO_DEEP = "nested too deeply, or an alias (*name) is inside what it names: write values out"
# Location of a value in a file: keys and positions from the root, e.g. ("rules", 0, "op").
Location = tuple[str | int, ...]


class _Loader(yaml.SafeLoader):
    """Loader that reads ``1e13`` as a number, as YAML 1.2 does; PyYAML reads it as text."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def resolve(policy: str | Path | Policy | Mapping[str, Any]) -> Policy:
    """Converts the policy argument of ``compile()`` to a Policy.

    Args:
        policy: preset name, path of a YAML file, Policy, or dict.

    Raises:
        UnknownPresetError: a name that is neither a preset nor a YAML file.
        PolicyError: a malformed policy.
    """
    if isinstance(policy, Policy):
        return policy
    if isinstance(policy, Mapping):
        return policy_from_dict(policy)
    if not isinstance(policy, str | Path):
        raise PolicyError(
            f"policy must be a preset name, a Policy, a dict or a path of a YAML file, got "
            f"{type(policy).__name__}",
            got=policy,
            expected=(str, Policy, dict, Path),
        )
    if Path(policy).suffix in (".yaml", ".yml"):
        return read_policy(policy)
    return policies.preset(str(policy))


def read_policy(path: str | Path) -> Policy:
    """Reads a YAML policy file.

    Raises:
        PolicyError: the file cannot be read or is malformed; the message has the line.
        PathTypeError: ``path`` is neither text nor a path.
    """
    path = as_path(path, "path")
    try:
        text = path.read_text(encoding="utf-8")
        root = yaml.compose(text, Loader=_Loader)
        values = yaml.load(text, Loader=_Loader)
    except OSError as error:
        raise PolicyError(f"cannot read policy file {path}: {error.strerror}", got=path) from error
    except UnicodeDecodeError as error:
        raise PolicyError(
            f"policy file {path} is not UTF-8 text", got=path, expected="UTF-8 text"
        ) from error
    except yaml.YAMLError as error:
        raise PolicyError(
            f"policy file {path} is not YAML: {error}", got=path, expected="YAML"
        ) from error
    except RecursionError as error:
        raise PolicyError(f"policy file {path} is {_TOO_DEEP}", got=path) from error
    lines: dict[Location, int] = {}
    if root is not None:
        try:
            _collect_lines(root, (), lines)
        except PolicyError as error:
            raise PolicyError(f"policy file {path}, {error}", got=error.got) from error
    return _policy(values, lambda at: f"{path}:{_nearest(lines, at)}")


def policy_from_dict(values: Mapping[str, Any]) -> Policy:
    """A Policy from plain values, the inverse of :func:`policy_to_dict`.

    Raises:
        PolicyError: malformed; the message says where.
    """
    return _policy(values, lambda at: ".".join(map(str, at)) or "policy")


def policy_to_dict(policy: Policy) -> dict[str, Any]:
    """Plain values of a policy, without values at their default."""
    values: dict[str, Any] = {"name": policy.name, "description": policy.description}
    for flag in FLAGS:
        if getattr(policy, flag):
            values[flag] = True
    if policy.search is not None:  # the metric is always written, for readers
        changed = _changed(policy.search, ScaleSearch())
        values["search"] = {"metric": str(policy.search.metric), **changed}
    if policy.low_rank is not None:
        values["low_rank"] = {k: v for k, v in asdict(policy.low_rank).items() if v is not None}
    if policy.allocation is not None:
        budget = {str(cost): limit for cost, limit in policy.allocation.budget.limits.items()}
        changed = _changed(policy.allocation, Allocation(budget=policy.allocation.budget))
        if "widths" in changed:
            changed["widths"] = list(changed["widths"])
        values["allocation"] = {"budget": budget, **changed}
    for name in ("compensation", "reconstruction", "dense_reconstruction"):
        options = getattr(policy, name)
        if options is not None:
            changed = _changed(options, type(options)())
            values[name] = {k: list(v) if isinstance(v, tuple) else v for k, v in changed.items()}
    return {**values, "rules": [_rule_to_dict(rule) for rule in policy.rules]}


def write_policy(policy: Policy, path: str | Path) -> None:
    """Writes a YAML policy file that :func:`read_policy` reads back equal.

    Raises:
        OutputError: the file cannot be written.
        PathTypeError: ``path`` is neither text nor a path.
    """
    write_text(as_path(path, "path"), to_yaml(policy))


def to_yaml(policy: Policy) -> str:
    """YAML text of a policy."""
    return yaml.safe_dump(policy_to_dict(policy), sort_keys=False)


def _rule_to_dict(rule: Rule) -> dict[str, Any]:
    values = _changed(rule, Rule(spec=None))
    values["spec"] = None
    if rule.spec is not None:  # the bit-width is always written, for readers
        values["spec"] = {"bits": rule.spec.bits, **_changed(rule.spec, TensorSpec())}
    return values


def _changed(item: Any, default: Any) -> dict[str, Any]:
    defaults = asdict(default)
    return {
        key: str(value) if isinstance(value, StrEnum) else value
        for key, value in asdict(item).items()
        if value != defaults[key]
    }


def _collect_lines(node: yaml.Node, at: Location, lines: dict[Location, int]) -> None:
    lines[at] = node.start_mark.line + 1
    if len(at) > _DEEPEST:
        raise PolicyError(f"line {lines[at]}: {_TOO_DEEP}")
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if (*at, key.value) in lines:
                raise PolicyError(
                    f"line {key.start_mark.line + 1}: {key.value!r} is there twice; keep one",
                    got=key.value,
                )
            _collect_lines(value, (*at, key.value), lines)
            lines[(*at, key.value)] = key.start_mark.line + 1
    elif isinstance(node, yaml.SequenceNode):
        for i, value in enumerate(node.value):
            _collect_lines(value, (*at, i), lines)


def _nearest(lines: dict[Location, int], at: Location) -> int:
    while at and at not in lines:
        at = at[:-1]
    return lines.get(at, 1)


def _policy(values: Any, where: Callable[[Location], str]) -> Policy:
    items = _mapping(values, Policy, (), where)
    rules = items.pop("rules", [])
    if not isinstance(rules, list):
        raise PolicyError(f"{where(('rules',))}: rules must be a list", got=rules, expected=list)
    items["rules"] = tuple(_rule(rule, ("rules", i), where) for i, rule in enumerate(rules))
    for name, kind in _PARTS.items():
        if items.get(name) is not None:
            options = _mapping(items[name], kind, (name,), where)
            items[name] = _build(kind, options, (name,), where)
    if items.get("allocation") is not None:
        items["allocation"] = _allocation(items["allocation"], where)
    return _build(Policy, {"name": "custom", **items}, (), where)  # type: ignore[no-any-return]


def _allocation(values: Any, where: Callable[[Location], str]) -> Allocation:
    at: Location = ("allocation",)
    items = _mapping(values, Allocation, at, where)
    if "budget" not in items:
        raise PolicyError(f"{where(at)}: the allocation has no budget")
    budget_at = (*at, "budget")
    budget = _mapping(items["budget"], Budget, budget_at, where)
    items["budget"] = _build(Budget, budget, budget_at, where)
    if isinstance(items.get("widths"), list):
        items["widths"] = tuple(items["widths"])
    return _build(Allocation, items, at, where)  # type: ignore[no-any-return]


def _rule(values: Any, at: Location, where: Callable[[Location], str]) -> Rule:
    items = _mapping(values, Rule, at, where)
    if "spec" not in items:
        raise PolicyError(
            f"{where(at)}: the rule has no spec; give one, or `spec: null` to keep edges float"
        )
    if items["spec"] is not None:
        spec_at = (*at, "spec")
        spec = _mapping(items["spec"], TensorSpec, spec_at, where)
        items["spec"] = _build(TensorSpec, spec, spec_at, where)
    return _build(Rule, items, at, where)  # type: ignore[no-any-return]


def _mapping(
    values: Any, cls: type, at: Location, where: Callable[[Location], str]
) -> dict[str, Any]:
    """``values`` as a dict from current names of fields of ``cls`` to values, enums parsed."""
    if not isinstance(values, Mapping):
        raise PolicyError(
            f"{where(at)}: expected the fields of a {cls.__name__}, got {values!r:.80}",
            got=values,
            expected=f"the fields of a {cls.__name__}",
        )
    known, new_names = [item.name for item in fields(cls)], new_names_of(cls)
    parsed: dict[str, Any] = {}
    for name, value in values.items():
        key = name
        if name in new_names:
            key, place = new_names[name], where((*at, name))
            if key in values:
                raise both_names_error(place, name, key)
            warn_renamed(place, name, key)
        if key not in known:
            raise _unknown_key(str(key), cls, where((*at, str(key))))
        enum = _ENUMS.get(key)
        if enum is not None and value is not None and value not in list(enum):
            raise UnknownKeyError(
                f"{where((*at, key))}: {key} {value!r} is unknown"
                f"{did_you_mean(str(value), list(enum))}; one of {', '.join(enum)}",
                got=value,
                expected=tuple(enum),
            )
        parsed[key] = enum(value) if enum is not None and value is not None else value
    return parsed


def _unknown_key(key: str, cls: type, place: str) -> UnknownKeyError:
    """The error for a key that ``cls`` does not have; it names the section that has the key."""
    known = [item.name for item in fields(cls)]
    homes = [
        home
        for kind, home in _PLACES.items()
        if key in new_names_of(kind) or any(item.name == key for item in fields(kind))
    ]
    if homes:
        return UnknownKeyError(
            f"{place}: unknown key {key!r} {_PLACES[cls]}; it belongs {' or '.join(homes)}",
            got=key,
            expected=" or ".join(homes),
        )
    return UnknownKeyError(
        f"{place}: unknown key {key!r}{did_you_mean(key, known)}; a {cls.__name__} has "
        f"{', '.join(known)}",
        got=key,
        expected=tuple(known),
    )


def _build(
    cls: Callable[..., Any], items: dict[str, Any], at: Location, where: Callable[[Location], str]
) -> Any:
    try:
        return cls(**items)
    except PolicyError as error:
        raise type(error)(
            f"{where(at)}: {error}", got=error.got, expected=error.expected
        ) from error
    except TypeError as error:
        raise PolicyError(f"{where(at)}: a value has the wrong type: {error}") from error

"""Policies: presets, YAML in and out, and errors that lead to the line and the fix."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fxquant import policies
from fxquant.config.allocation import Allocation, Budget, Method, Sensitivity
from fxquant.config.recovery import Reconstruction
from fxquant.config.scale_search import GradientLoss, Metric, ScaleSearch
from fxquant.config.spec import MIN_BITS, Granularity, ObserverKind, Scheme, TensorSpec
from fxquant.config.vocabulary import Arg, OpKind
from fxquant.errors import (
    BitWidthError,
    PolicyError,
    UnknownKeyError,
    UnknownPresetError,
)
from fxquant.graph.dialect import PRODUCER_NAMES
from fxquant.policies.policy import Policy, Rule
from fxquant.policies.policy_file import (
    policy_from_dict,
    policy_to_dict,
    read_policy,
    resolve,
    to_yaml,
    write_policy,
)
from tests.helpers.refusals import refused

NOTHING = Rule(spec=None)

uniform = st.builds(
    TensorSpec,
    bits=st.integers(2, 16),
    symmetric=st.booleans(),
    granularity=st.sampled_from(Granularity),
    observer=st.sampled_from(ObserverKind),
)
clipped = st.builds(
    TensorSpec, observer=st.just(ObserverKind.PERCENTILE), percentile=st.floats(50.5, 100)
)
twin = st.builds(
    TensorSpec,
    bits=st.integers(2, 8),
    scheme=st.just(Scheme.TWIN_UNIFORM),
    observer=st.sampled_from(ObserverKind),
    max_shift=st.none() | st.integers(1, 11),
)
ONE_SIDED = [scheme for scheme in Scheme if scheme.limits.is_one_sided]
one_sided = st.builds(
    TensorSpec,
    bits=st.integers(2, min(8, *(scheme.limits.max_bits for scheme in ONE_SIDED))),
    scheme=st.sampled_from(ONE_SIDED),
    observer=st.sampled_from(ObserverKind),
)
specs = uniform | clipped | twin | one_sided
searches = st.builds(
    ScaleSearch,
    metric=st.sampled_from(Metric),
    loss=st.sampled_from(GradientLoss),
    rounds=st.integers(1, 5),
    low=st.floats(0.01, 0.9),
    memory_bytes=st.integers(1, 1 << 40),
)
rules = st.builds(
    Rule,
    spec=st.none() | specs,
    path=st.sampled_from([".*", r"blocks\.\d+\.attn", "ü|#: '", "null", "0"]),
    op=st.none() | st.sampled_from(OpKind),
    arg=st.none() | st.sampled_from(Arg),
    fed_by=st.none() | st.sampled_from(sorted(PRODUCER_NAMES)),
    optional=st.booleans(),
    pinned=st.booleans(),
)
bounds = st.none() | st.floats(1, 1e12) | st.integers(1, 1 << 40)
budgets = st.builds(
    Budget, mean_bits=st.floats(2, 8), **dict.fromkeys(("weight_bytes", "bitops"), bounds)
)
allocations = st.builds(
    Allocation,
    budget=budgets,
    widths=st.lists(st.integers(2, 8), min_size=1).map(tuple),
    method=st.sampled_from(Method),
    sensitivity=st.sampled_from(Sensitivity),
    images=st.none() | st.integers(1, 64),
    max_macs=st.floats(1, 1e18),
    recheck=st.integers(0, 4),
    seed=st.integers(0, 9),
)
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
policy_values = st.builds(
    Policy,
    name=texts,
    description=texts,
    rules=st.lists(rules, min_size=1, max_size=4).map(tuple),
    search=st.none() | searches,
    rotate=st.booleans(),
    rotate_hidden=st.booleans(),
    trial_rotations=st.booleans(),
    centre_heads=st.booleans(),
    defer_softmax=st.booleans(),
    reparameterize=st.booleans(),
    bias_correction=st.booleans(),
    allocation=st.none() | allocations,
    dense_reconstruction=st.none()
    | st.builds(
        Reconstruction,
        images=st.integers(0, 256),
        iterations=st.integers(1, 99),
        max_macs=st.none() | st.floats(1, 1e18),
    ),
)


@given(policy=policy_values)
def test_yaml_round_trip(policy: Policy, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "round.yaml"
    write_policy(policy, path)
    assert read_policy(path) == policy
    assert resolve(str(path)) == policy


@given(policy=policy_values)
def test_dict_round_trip(policy: Policy) -> None:
    assert policy_from_dict(policy_to_dict(policy)) == policy
    assert resolve(policy_to_dict(policy)) == policy


def test_yaml_is_short_defaults_are_left_out() -> None:
    policy = Policy(name="p", rules=(Rule(spec=TensorSpec(bits=4), arg=Arg.WEIGHT),))
    assert policy_to_dict(policy)["rules"] == [{"arg": "weight", "spec": {"bits": 4}}]
    assert "percentile" not in to_yaml(policy)


@pytest.mark.parametrize("name", policies.PRESETS)
def test_presets_are_valid_and_survive_yaml(name: str, tmp_path: Path) -> None:
    policy = resolve(name)
    assert policy == policies.PRESETS[name]() and policy.description
    write_policy(policy, tmp_path / "policy.yaml")
    assert read_policy(tmp_path / "policy.yaml") == policy


def test_minmax_takes_widths() -> None:
    policy = policies.minmax(weight_bits=4, act_bits=6)
    assert policy.name == "minmax_w4a6"
    assert [rule.spec.bits for rule in policy.rules if rule.spec] == [4, 6]
    with refused(BitWidthError, got=1, expected="2..16"):
        policies.minmax(weight_bits=1)


def test_rules_put_before_a_preset_come_first() -> None:
    mine = Rule(path="head", spec=None)
    policy = policies.w8a8().with_rules(mine)
    assert policy.rules == (mine, *policies.w8a8().rules)


def test_a_malformed_dict_is_explained() -> None:
    with refused(
        UnknownKeyError, r"^rules\.0\.spec\.bit: .*did you mean 'bits'", got="bit"
    ) as caught:
        policy_from_dict({"rules": [{"spec": {"bit": 4}}]})
    assert "bits" in caught.value.expected
    text = "^policy: expected the fields of a Policy"
    with refused(PolicyError, text, got=[], expected="the fields of a Policy"):
        policy_from_dict([])  # type: ignore[arg-type]


def test_names_that_are_no_policy(tmp_path: Path) -> None:
    text, known = r"'w8a9'; did you mean 'w8a8'\?.*minmax.*\.yaml", tuple(policies.PRESETS)
    with refused(UnknownPresetError, text, got="w8a9", expected=known):
        resolve("w8a9")
    gone, binary = tmp_path / "gone.yaml", tmp_path / "binary.yml"
    with refused(PolicyError, r"read policy file .*gone\.yaml: No such file", got=gone):
        resolve(gone)
    text = r"preset name, a Policy, a dict or a path .* got int"
    with refused(PolicyError, text, got=8, expected=(str, Policy, dict, Path)):
        resolve(8)  # type: ignore[arg-type]
    binary.write_bytes(b"\xff\xfe\x00")
    with refused(PolicyError, r"binary\.yml is not UTF-8 text", got=binary, expected="UTF-8 text"):
        resolve(binary)


def test_options_that_no_preset_takes() -> None:
    text = "ptq4vit has no image_bit; did you mean 'image_bits'"
    with refused(PolicyError, text, got="image_bit") as caught:
        policies.preset("ptq4vit", image_bit=8)
    assert "image_bits" in caught.value.expected
    with refused(PolicyError, "ptq4vit has no budget: best, mptq_vit take it", got="budget"):
        policies.preset("ptq4vit", budget=4)


def test_a_policy_without_rules_would_do_nothing() -> None:
    with pytest.raises(PolicyError, match="would quantize nothing"):
        Policy(name="empty")


@pytest.mark.parametrize("field", ["granularity", "observer", "scheme"])
def test_plain_strings_are_as_good_as_enums(field: str) -> None:
    enum: Any = {"granularity": Granularity, "observer": ObserverKind, "scheme": Scheme}[field]
    for member in enum:
        assert getattr(TensorSpec(bits=MIN_BITS, **{field: str(member)}), field) is member
    with refused(UnknownKeyError, f"^{field} must", got="nonsense", expected=tuple(enum)):
        TensorSpec(**{field: "nonsense"})  # type: ignore[arg-type]


def test_plain_strings_are_as_good_as_enums_in_rules() -> None:
    rule = Rule(spec=None, op="matmul", arg="lhs")  # type: ignore[arg-type]
    assert rule.op is OpKind.MATMUL and rule.arg is Arg.LHS
    with refused(
        UnknownKeyError, r"^arg must be one of .*got 'key'", got="key", expected=tuple(Arg)
    ):
        Rule(spec=None, arg="key")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("make", "got", "expected", "text"),
    [
        (
            lambda: TensorSpec(percentile="99"),
            "99",
            "a number",
            "^percentile must be a number, got",
        ),
        (lambda: TensorSpec(percentile=True), True, "a number", None),
        (
            lambda: TensorSpec(percentile=math.nan),
            math.nan,
            "(50, 100]",
            r"^percentile must be in \(",
        ),
        (
            lambda: TensorSpec(percentile=99, observer="mse"),
            ObserverKind.MSE,
            ObserverKind.PERCENTILE,
            "percentile belongs to observer percentile alone, and the observer is mse",
        ),
        (lambda: Rule(spec="w8"), "w8", (TensorSpec, None), "spec must be .*, or None .* got 'w8'"),
        (lambda: Rule(spec=None, path=None), None, str, "path must be .* as text, got None"),
        (lambda: Policy(name="p", rules=(None,)), None, Rule, "rule 1 must be a Rule, got None"),
        (
            lambda: Policy(name="p", rules=NOTHING),
            NOTHING,
            "a tuple of Rule",
            "rules must be a tuple of Rule, got Rule",
        ),
        (lambda: Policy(name=3, rules=(NOTHING,)), (3, ""), str, "must be text, got 3"),
    ],
)
def test_values_of_a_wrong_type_are_policy_errors(
    make: Callable[[], object], got: object, expected: object, text: str | None
) -> None:
    with refused(PolicyError, text, got=got, expected=expected):
        make()


@pytest.mark.parametrize(
    ("make", "got", "expected"),
    [
        (lambda: TensorSpec(observer=3), 3, tuple(ObserverKind)),
        (lambda: Rule(spec=None, fed_by=["gelu"]), ["gelu"], tuple(sorted(PRODUCER_NAMES))),
        (lambda: Rule(spec=None, op=3), 3, tuple(OpKind)),
    ],
)
def test_values_of_a_wrong_type_are_none_of_the_known(
    make: Callable[[], object], got: object, expected: object
) -> None:
    with refused(UnknownKeyError, got=got, expected=expected):
        make()

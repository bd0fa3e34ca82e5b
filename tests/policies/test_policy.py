"""Policies: presets, YAML in and out, and errors that lead to the line and the fix."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fxquant import policies
from fxquant.config.allocation import Allocation, Budget, Method, Sensitivity
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
    defer_softmax=st.booleans(),
    reparameterize=st.booleans(),
    bias_correction=st.booleans(),
    allocation=st.none() | allocations,
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
    with pytest.raises(BitWidthError, match=r"2\.\.16, got 1") as caught:
        policies.minmax(weight_bits=1)
    assert (caught.value.got, caught.value.expected) == (1, "2..16")


def test_rules_put_before_a_preset_come_first() -> None:
    mine = Rule(path="head", spec=None)
    policy = policies.w8a8().with_rules(mine)
    assert policy.rules == (mine, *policies.w8a8().rules)


def test_a_malformed_dict_is_explained() -> None:
    with pytest.raises(UnknownKeyError, match=r"rules\.0\.spec\.bit: .*did you mean 'bits'"):
        policy_from_dict({"rules": [{"spec": {"bit": 4}}]})
    with pytest.raises(PolicyError, match=r"^policy: expected the fields of a Policy"):
        policy_from_dict([])  # type: ignore[arg-type]


def test_names_that_are_no_policy(tmp_path: Path) -> None:
    with pytest.raises(UnknownPresetError, match=r"'w8a9'; did you mean 'w8a8'\?.*minmax.*\.yaml"):
        resolve("w8a9")
    with pytest.raises(PolicyError, match=r"cannot read policy file .*gone\.yaml: No such file"):
        resolve(tmp_path / "gone.yaml")
    with pytest.raises(PolicyError, match=r"preset name, a Policy, a dict or a path .* got int"):
        resolve(8)  # type: ignore[arg-type]
    binary = tmp_path / "binary.yml"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PolicyError, match=r"binary\.yml is not UTF-8 text"):
        resolve(binary)


def test_options_that_no_preset_takes() -> None:
    with pytest.raises(PolicyError, match="ptq4vit has no image_bit; did you mean 'image_bits'"):
        policies.preset("ptq4vit", image_bit=8)
    with pytest.raises(PolicyError, match="ptq4vit has no budget: best, mptq_vit take it"):
        policies.preset("ptq4vit", budget=4)


def test_a_policy_without_rules_would_do_nothing() -> None:
    with pytest.raises(PolicyError, match="would quantize nothing"):
        Policy(name="empty")


@pytest.mark.parametrize("field", ["granularity", "observer", "scheme"])
def test_plain_strings_are_as_good_as_enums(field: str) -> None:
    enum: Any = {"granularity": Granularity, "observer": ObserverKind, "scheme": Scheme}[field]
    for member in enum:
        assert getattr(TensorSpec(bits=MIN_BITS, **{field: str(member)}), field) is member
    with pytest.raises(PolicyError, match=f"{field} must be one of .*got 'nonsense'"):
        TensorSpec(**{field: "nonsense"})  # type: ignore[arg-type]


def test_plain_strings_are_as_good_as_enums_in_rules() -> None:
    rule = Rule(spec=None, op="matmul", arg="lhs")  # type: ignore[arg-type]
    assert rule.op is OpKind.MATMUL and rule.arg is Arg.LHS
    with pytest.raises(PolicyError, match=r"arg must be one of .*got 'key'"):
        Rule(spec=None, arg="key")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TensorSpec(percentile="99"), "percentile must be a number, got '99'"),
        (lambda: TensorSpec(percentile=True), "percentile must be a number, got True"),
        (
            lambda: TensorSpec(percentile=float("nan")),
            r"percentile must be in \(50, 100\], got nan",
        ),
        (
            lambda: TensorSpec(percentile=99, observer="mse"),
            "percentile belongs to observer percentile alone, and the observer is mse",
        ),
        (lambda: TensorSpec(observer=3), "observer must be one of .*got 3"),
        (lambda: Rule(spec="w8"), "spec must be a TensorSpec, or None .* got 'w8'"),
        (lambda: Rule(spec=None, path=None), "path must be a regular expression as text, got None"),
        (lambda: Rule(spec=None, fed_by=["gelu"]), r"fed_by \['gelu'\] is unknown"),
        (lambda: Rule(spec=None, op=3), "op must be one of .*got 3"),
        (lambda: Policy(name="p", rules=(None,)), "rule 1 must be a Rule, got None"),
        (
            lambda: Policy(name="p", rules=Rule(spec=None)),
            "rules must be a tuple of Rule, got Rule",
        ),
        (lambda: Policy(name=3, rules=(Rule(spec=None),)), "must be text, got 3"),
    ],
)
def test_values_of_a_wrong_type_are_policy_errors(make: Any, message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        make()

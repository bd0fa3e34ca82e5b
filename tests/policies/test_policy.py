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
    OutputError,
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
    reparameterize=st.booleans(),
    bias_correction=st.booleans(),
    allocation=st.none() | allocations,
)


ALLOCATION = "rules:\n  - spec: {}\nallocation:\n"


def written(folder: Path, text: str) -> Path:
    path = folder / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    return path


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
    assert read_policy(written(tmp_path, to_yaml(policy))) == policy


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


@pytest.mark.parametrize(
    ("text", "error", "parts"),
    [
        (
            "name: p\nrules:\n  - spec:\n      bitz: 4\n",
            UnknownKeyError,
            ["mine.yaml:4:", "'bitz'", "did you mean 'bits'?"],
        ),
        (
            "name: p\nrulez: []\n",
            UnknownKeyError,
            ["mine.yaml:2:", "'rulez'", "did you mean 'rules'?"],
        ),
        (
            "rules:\n  - spec: {bits: 8}\n  - pth: a\n    spec: null\n",
            UnknownKeyError,
            ["mine.yaml:3:", "'pth'", "did you mean 'path'?"],
        ),
        (
            "rules:\n  - spec: {bits: 8}\n    arg: weights\n",
            UnknownKeyError,
            ["mine.yaml:3:", "'weights'", "did you mean 'weight'?", "lhs, rhs"],
        ),
        (
            "rules:\n  - spec:\n      bits: 8\n      granularity: row\n",
            UnknownKeyError,
            ["mine.yaml:4:", "'row'", "tensor, channel, head"],
        ),
        (
            "rules:\n  - spec: {}\n  - fed_by: sofmax\n    spec: {}\n",
            UnknownKeyError,
            ["mine.yaml:3:", "'sofmax'", "softmax"],
        ),
        ("rules:\n  - spec: {bits: 1}\n", BitWidthError, ["mine.yaml:2:", "2..16", "got 1"]),
        ("rules:\n  - spec: {bits: 17}\n", BitWidthError, ["mine.yaml:2:", "got 17"]),
        ("rules:\n  - spec: {bits: '8'}\n", BitWidthError, ["mine.yaml:2:", "integer", "'8'"]),
        ("rules:\n  - spec: {bits: true}\n", BitWidthError, ["mine.yaml:2:", "integer"]),
        ("rules:\n  - spec: {percentile: 20}\n", PolicyError, ["mine.yaml:2:", "(50, 100]"]),
        (
            "rules:\n  - spec: {percentile: high}\n",
            PolicyError,
            ["mine.yaml:2:", "number", "'high'"],
        ),
        ("rules:\n  - spec: {symmetric: 'no'}\n", PolicyError, ["mine.yaml:2:", "symmetric"]),
        ("rules:\n  - spec: {observer: null}\n", UnknownKeyError, ["mine.yaml:2:", "observer"]),
        ("rules:\n  - spec: {}\n    optional: 'no'\n", PolicyError, ["mine.yaml:2:", "optional"]),
        ("rules:\n  - path: '['\n    spec: {}\n", PolicyError, ["mine.yaml:2:", "regular expr"]),
        ("rules:\n  - path: 3\n    spec: {}\n", PolicyError, ["mine.yaml:2:", "text", "got 3"]),
        ("rules:\n  - fed_by: [a]\n    spec: {}\n", UnknownKeyError, ["mine.yaml:2:", "['a']"]),
        ("rules:\n  - op: [a]\n    spec: {}\n", UnknownKeyError, ["mine.yaml:2:", "['a']"]),
        ("name: 3\nrules:\n  - spec: {}\n", PolicyError, ["mine.yaml:1:", "must be text", "3"]),
        ("rules:\n  - arg: weight\n", PolicyError, ["mine.yaml:2:", "no spec", "`spec: null`"]),
        ("rules:\n  - spec: 8\n", PolicyError, ["mine.yaml:2:", "fields of a TensorSpec", "8"]),
        (f"{ALLOCATION}  budget: {{}}\n", PolicyError, ["mine.yaml:4:", "the budget is empty"]),
        (f"{ALLOCATION}  widths: [4]\n", PolicyError, ["mine.yaml:3:", "has no budget"]),
        (f"{ALLOCATION}  budget: 4\n", PolicyError, ["mine.yaml:4:", "fields of a Budget"]),
        (
            f"{ALLOCATION}  budget: {{mean_bit: 4}}\n",
            UnknownKeyError,
            ["mine.yaml:4:", "did you mean 'mean_bits'"],
        ),
        (
            f"{ALLOCATION}  budget: {{mean_bits: 4}}\n  method: best\n",
            UnknownKeyError,
            ["mine.yaml:5:", "exact, greedy"],
        ),
        (
            f"{ALLOCATION}  budget: {{mean_bits: 4}}\n  widths: [4, 9]\n",
            BitWidthError,
            ["mine.yaml:3:", "2..8, got 9"],
        ),
        ("rules: 5\n", PolicyError, ["mine.yaml:1:", "rules must be a list"]),
        ("name: p\n", PolicyError, ["mine.yaml:1:", "has no rules"]),
        ("", PolicyError, ["mine.yaml:1:", "fields of a Policy"]),
        ("- a\n- b\n", PolicyError, ["mine.yaml:1:", "fields of a Policy"]),
        ("rules: [\n", PolicyError, ["mine.yaml", "is not YAML", "line 2"]),
        ("rules: !!python/object:os.system {}\n", PolicyError, ["mine.yaml", "is not YAML"]),
    ],
)
def test_a_malformed_file_is_explained(
    tmp_path: Path, text: str, error: type[PolicyError], parts: list[str]
) -> None:
    with pytest.raises(error) as caught:
        read_policy(written(tmp_path, text))
    assert type(caught.value) is error
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize("number", ["1e13", "1.0e+13", "10000000000000"])
def test_numbers_with_an_exponent(tmp_path: Path, number: str) -> None:
    part = f"{{scope: network, max_macs: {number}}}"
    text = f"rules: [{{spec: {{bits: 8}}}}]\nreconstruction: {part}\n"
    policy = read_policy(written(tmp_path, text))
    assert policy.reconstruction is not None
    assert policy.reconstruction.max_macs == 1e13


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


def test_a_policy_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write"):
        write_policy(policies.w8a8(), tmp_path / "file" / "p.yaml")


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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("allocation:\n  budget: {mean_bits: 4}\n  widths: 4\n", r"`widths: \[4, 8\]`, got 4"),
        ("reconstruction:\n  ranks: 16\n", r"`ranks: \[16\]`, got 16"),
    ],
)
def test_a_lone_number_in_the_place_of_a_list(tmp_path: Path, options: str, message: str) -> None:
    path = written(tmp_path, f"{options}rules:\n- spec: {{bits: 8}}\n")
    with pytest.raises(PolicyError, match=rf"\.yaml:1: .*or a list in a policy file.*{message}"):
        read_policy(path)

"""Policy files: YAML in and out, with errors that lead to the line and the fix."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest

from fxquant import policies
from fxquant.config.allocation import Cost, Method
from fxquant.config.spec import Granularity, ObserverKind
from fxquant.config.vocabulary import Arg, OpKind
from fxquant.errors import BitWidthError, OutputError, PolicyError, UnknownKeyError
from fxquant.graph.dialect import PRODUCER_NAMES
from fxquant.policies.policy_file import read_policy, write_policy
from tests.helpers.refusals import refused

FLAG, PRODUCERS = (True, False), sorted(PRODUCER_NAMES)
ALLOCATION = "rules:\n  - spec: {}\nallocation:\n"


def written(folder: Path, text: str) -> Path:
    path = folder / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("text", "line", "got", "parts"),
    [
        (
            "name: p\nrules:\n  - spec:\n      bitz: 4\n",
            4,
            "bitz",
            "unknown key 'bitz'; did you mean 'bits'?",
        ),
        ("name: p\nrulez: []\n", 2, "rulez", "did you mean 'rules'?"),
        (
            "rules:\n  - spec: {bits: 8}\n  - pth: a\n    spec: null\n",
            3,
            "pth",
            "did you mean 'path'?",
        ),
        (f"{ALLOCATION}  budget: {{mean_bit: 4}}\n", 4, "mean_bit", "did you mean 'mean_bits'"),
    ],
)
def test_unknown_keys_are_explained(
    tmp_path: Path, text: str, line: int, got: str, parts: str
) -> None:
    with refused(UnknownKeyError, got=got) as caught:
        read_policy(written(tmp_path, text))
    assert f"mine.yaml:{line}: " in str(caught.value) and parts in str(caught.value)
    assert parts.split("'")[-2] in caught.value.expected


@pytest.mark.parametrize(
    ("text", "line", "got", "expected"),
    [
        ("rules:\n  - spec: {bits: 8}\n    arg: weights\n", 3, "weights", Arg),
        ("rules:\n  - spec:\n      bits: 8\n      granularity: row\n", 4, "row", Granularity),
        ("rules:\n  - spec: {}\n  - fed_by: sofmax\n    spec: {}\n", 3, "sofmax", PRODUCERS),
        ("rules:\n  - spec: {observer: null}\n", 2, None, ObserverKind),
        ("rules:\n  - fed_by: [a]\n    spec: {}\n", 2, ["a"], PRODUCERS),
        ("rules:\n  - op: [a]\n    spec: {}\n", 2, ["a"], OpKind),
        (f"{ALLOCATION}  budget: {{mean_bits: 4}}\n  method: best\n", 5, "best", Method),
    ],
)
def test_unknown_values_are_explained(
    tmp_path: Path, text: str, line: int, got: object, expected: Iterable[str]
) -> None:
    with refused(UnknownKeyError, rf"mine\.yaml:{line}: ", got=got, expected=tuple(expected)):
        read_policy(written(tmp_path, text))


def test_an_unknown_value_is_shown_with_the_nearest(tmp_path: Path) -> None:
    text = r"arg 'weights' is unknown; did you mean 'weight'\?; one of input, weight, lhs, rhs"
    with refused(UnknownKeyError, text):
        read_policy(written(tmp_path, "rules: [{spec: null, arg: weights}]\n"))


@pytest.mark.parametrize(
    ("text", "line", "got", "expected"),
    [
        ("rules:\n  - spec: {bits: 1}\n", 2, 1, "2..16"),
        ("rules:\n  - spec: {bits: 17}\n", 2, 17, "2..16"),
        ("rules:\n  - spec: {bits: '8'}\n", 2, "8", int),
        ("rules:\n  - spec: {bits: true}\n", 2, True, int),
        (f"{ALLOCATION}  budget: {{mean_bits: 4}}\n  widths: [4, 9]\n", 3, 9, "2..8"),
    ],
)
def test_wrong_widths_are_explained(
    tmp_path: Path, text: str, line: int, got: object, expected: object
) -> None:
    with refused(BitWidthError, rf"mine\.yaml:{line}: ", got=got, expected=expected):
        read_policy(written(tmp_path, text))


@pytest.mark.parametrize(
    ("text", "line", "got", "expected", "part"),
    [
        ("rules:\n  - spec: {percentile: 20}\n", 2, 20, "(50, 100]", ""),
        ("rules:\n  - spec: {percentile: high}\n", 2, "high", "a number", ""),
        ("rules:\n  - spec: {symmetric: 'no'}\n", 2, "no", FLAG, "symmetric"),
        ("rules:\n  - spec: {}\n    optional: 'no'\n", 2, "no", FLAG, "optional"),
        ("rules:\n  - path: '['\n    spec: {}\n", 2, "[", "a regular expression", "'[' is not a"),
        ("rules:\n  - path: 3\n    spec: {}\n", 2, 3, str, ""),
        ("name: 3\nrules:\n  - spec: {}\n", 1, (3, ""), str, ""),
        ("rules:\n  - arg: weight\n", 2, None, None, "no spec; give one, or `spec: null`"),
        ("rules:\n  - spec: 8\n", 2, 8, "the fields of a TensorSpec", ""),
        (f"{ALLOCATION}  budget: {{}}\n", 4, None, tuple(Cost), ""),
        (f"{ALLOCATION}  widths: [4]\n", 3, None, None, "the allocation has no budget"),
        (f"{ALLOCATION}  budget: 4\n", 4, 4, "the fields of a Budget", ""),
        ("rules: 5\n", 1, 5, list, "rules must be a list"),
        ("name: p\n", 1, None, None, "has no rules"),
        ("", 1, None, "the fields of a Policy", ""),
        ("- a\n- b\n", 1, ["a", "b"], "the fields of a Policy", ""),
    ],
)
def test_a_malformed_file_is_explained(
    tmp_path: Path, text: str, line: int, got: object, expected: object, part: str
) -> None:
    with refused(PolicyError, got=got, expected=expected) as caught:
        read_policy(written(tmp_path, text))
    assert f"mine.yaml:{line}: " in str(caught.value) and part in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rules: [\n", r"mine\.yaml is not YAML.*(?s:.)*line 2"),
        ("rules: !!python/object:os.system {}\n", r"mine\.yaml is not YAML"),
    ],
)
def test_a_file_that_is_not_yaml_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = written(tmp_path, text)
    with refused(PolicyError, message, got=path, expected="YAML"):
        read_policy(path)


RULES = "rules:\n  - spec: {}\n"


@pytest.mark.parametrize(
    ("text", "line", "key", "home", "here"),
    [
        (
            f"search_region_ratio: true\n{RULES}",
            1,
            "search_region_ratio",
            "search",
            "at the top level",
        ),
        (f"opt_m: true\n{RULES}", 1, "opt_m", "search", "at the top level"),
        (f"{RULES}rank: 4\n", 3, "rank", "low_rank", "at the top level"),
        (f"{RULES}ridge: true\n", 3, "ridge", "compensation", "at the top level"),
        (f"{RULES}iterations: 9\n", 3, "iterations", "reconstruction", "at the top level"),
        (f"{RULES}budget: {{mean_bits: 4}}\n", 3, "budget", "allocation", "at the top level"),
        (f"{RULES}mean_bits: 4\n", 3, "mean_bits", "budget:` of `allocation", "at the top level"),
        (f"{RULES}fed_by: softmax\n", 3, "fed_by", "rules", "at the top level"),
        (f"{RULES}symmetric: true\n", 3, "symmetric", "spec", "at the top level"),
        (f"{RULES}    bits: 4\n", 3, "bits", "low_rank:` or under `spec", "in a rule of `rules:`"),
        (f"search: {{gptq: true}}\n{RULES}", 1, "gptq", "compensation", "under `search:`"),
        (f"{ALLOCATION}  mean_bits: 4\n", 4, "mean_bits", "budget", "under `allocation:`"),
    ],
)
def test_a_key_in_the_wrong_place_is_told_its_section(
    tmp_path: Path, text: str, line: int, key: str, home: str, here: str
) -> None:
    with pytest.raises(UnknownKeyError) as caught:
        read_policy(written(tmp_path, text))
    assert caught.value.got == key and f"`{home}:`" in str(caught.value.expected)
    message = str(caught.value)
    assert f"mine.yaml:{line}: unknown key {key!r} {here}; it belongs " in message
    assert message.endswith(str(caught.value.expected))


def test_a_key_of_the_top_level_in_a_section(tmp_path: Path) -> None:
    with pytest.raises(UnknownKeyError, match="`search:`; it belongs at the top level"):
        read_policy(written(tmp_path, f"search: {{smooth: true}}\n{RULES}"))


@pytest.mark.parametrize("number", ["1e13", "1.0e+13", "10000000000000"])
def test_numbers_with_an_exponent(tmp_path: Path, number: str) -> None:
    part = f"{{scope: network, max_macs: {number}}}"
    text = f"rules: [{{spec: {{bits: 8}}}}]\nreconstruction: {part}\n"
    policy = read_policy(written(tmp_path, text))
    assert policy.reconstruction is not None
    assert policy.reconstruction.max_macs == 1e13


def test_a_policy_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    path = tmp_path / "file" / "p.yaml"
    with refused(OutputError, got=path):
        write_policy(policies.w8a8(), path)


@pytest.mark.parametrize(
    ("options", "number", "message"),
    [
        ("allocation:\n  budget: {mean_bits: 4}\n  widths: 4\n", 4, r"`widths: \[4, 8\]`, got 4"),
        ("reconstruction:\n  ranks: 16\n", 16, r"`ranks: \[16\]`, got 16"),
    ],
)
def test_a_lone_number_in_the_place_of_a_list(
    tmp_path: Path, options: str, number: int, message: str
) -> None:
    path = written(tmp_path, f"{options}rules:\n- spec: {{bits: 8}}\n")
    with refused(PolicyError, rf"\.yaml:1: .*or a list in a policy file.*{message}", got=number):
        read_policy(path)

"""Policy files: YAML in and out, with errors that lead to the line and the fix."""

from __future__ import annotations

from pathlib import Path

import pytest

from fxquant import policies
from fxquant.errors import BitWidthError, OutputError, PolicyError, UnknownKeyError
from fxquant.policies.policy_file import read_policy, write_policy

ALLOCATION = "rules:\n  - spec: {}\nallocation:\n"


def written(folder: Path, text: str) -> Path:
    path = folder / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    return path


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
    with pytest.raises(OutputError, match="cannot write"):
        write_policy(policies.w8a8(), tmp_path / "file" / "p.yaml")


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

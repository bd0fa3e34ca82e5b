"""Arguments of the wrong type: what the errors name."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import fxquant
from fxquant import (
    Allocation,
    Budget,
    Compensation,
    LowRank,
    Policy,
    Reconstruction,
    Rule,
    TensorSpec,
    policies,
)
from fxquant.backends.inductor import lower_to_inductor
from fxquant.backends.integer import lower_to_integer
from fxquant.backends.onnx_qdq import doctor, make_session
from fxquant.config.scale_search import ScaleSearch
from fxquant.demo.models import build
from fxquant.errors import LoweringError, PathTypeError, PolicyError, UnknownKeyError
from fxquant.policies.policy_file import read_policy, resolve, write_policy
from fxquant.testing import images
from tests.helpers.refusals import refused


def flags(function: Callable[..., object]) -> list[str]:
    """Names of the parameters of a function or dataclass that are booleans."""
    parameters = inspect.signature(function).parameters.values()
    return [item.name for item in parameters if item.annotation in ("bool", "bool | None", bool)]


FLAGS = [
    (function, name)
    for function in (
        *(Policy, Rule, TensorSpec, ScaleSearch, Allocation, Budget, LowRank),
        *(Compensation, Reconstruction, *policies.PRESETS.values()),
    )
    for name in flags(function)
]
REQUIRED = {Rule: {"spec": None}, Policy: {"name": "p"}, Allocation: {"budget": None}}


@pytest.mark.parametrize(
    ("function", "name"), FLAGS, ids=lambda value: getattr(value, "__name__", value)
)
@pytest.mark.parametrize("value", ["yes", 1, None])
def test_every_flag_of_a_policy_is_a_boolean(
    function: Callable[..., object], name: str, value: object
) -> None:
    with refused(PolicyError, f"^{name} must be true or false", got=value, expected=(True, False)):
        function(**{**REQUIRED.get(function, {}), name: value})


def test_the_flags_of_policies_are_found() -> None:
    assert len(FLAGS) >= 20
    assert (Reconstruction, "bf16") in FLAGS and (policies.w8a8, "full") in FLAGS


def test_flags_of_compile_and_lower_are_booleans(
    vit: nn.Module, quantized: fxquant.CompiledModel
) -> None:
    assert flags(fxquant.compile) == ["progress"]
    with refused(PolicyError, "^progress must be", got="no", expected=(True, False)):
        fxquant.compile(vit, [images(4, 16)], progress="no")  # type: ignore[arg-type]
    assert flags(lower_to_integer) == ["integer_only", "float_products"]
    assert flags(lower_to_inductor) == []
    text = "^integer_only must be true, false or None, got 'yes'"
    with refused(LoweringError, text, got="yes", expected=(True, False, None)):
        quantized.lower("integer", integer_only="yes")
    text = "^float_products must be true or false, got 1"
    with refused(LoweringError, text, got=1, expected=(True, False)):
        quantized.lower("integer", float_products=1)


def test_paths_are_accepted_as_text_and_as_paths(
    quantized: fxquant.CompiledModel, tmp_path: Path
) -> None:
    policy, x = policies.w8a8(), images(2, 16)
    for index, kind in enumerate((str, Path)):
        folder, file = kind(tmp_path / f"saved{index}"), kind(tmp_path / f"{index}.yaml")
        quantized.save(folder)
        assert torch.equal(fxquant.load(folder)(x), quantized(x))
        write_policy(policy, file)
        assert read_policy(file) == policy == resolve(file)
        onnx = kind(tmp_path / f"{index}.onnx")
        assert quantized.export_onnx(onnx).path == doctor(onnx).path == Path(onnx)


@pytest.mark.parametrize(
    ("name", "use"),
    [
        ("folder", lambda model, value: fxquant.load(value)),
        ("folder", lambda model, value: model.save(value)),
        ("path", lambda model, value: model.export_onnx(value)),
        ("path", lambda model, value: read_policy(value)),
        ("path", lambda model, value: write_policy(policies.w8a8(), value)),
        ("path", lambda model, value: doctor(value)),
        ("path", lambda model, value: make_session(value)),
        ("weights", lambda model, value: build("glyph_vit", value)),
    ],
)
@pytest.mark.parametrize("value", [3, b"folder", ["folder"]])
def test_other_values_than_paths_are_named(
    quantized: fxquant.CompiledModel, name: str, use: Callable[..., object], value: object
) -> None:
    message = re.escape(f"{name} must be a path as text or pathlib.Path, got {value!r}")
    with refused(PathTypeError, message, got=value, expected=(str, Path)) as caught:
        use(quantized, value)
    assert isinstance(caught.value, TypeError)


@pytest.mark.parametrize(
    ("make", "nearest"),
    [
        (lambda: TensorSpec(scheme="unifrom"), "uniform"),
        (lambda: TensorSpec(granularity="chanel"), "channel"),
        (lambda: TensorSpec(observer="minmx"), "minmax"),
        (lambda: Rule(spec=None, op="matmull"), "matmul"),
        (lambda: Rule(spec=None, arg="wieght"), "weight"),
        (lambda: Rule(spec=None, end="frist"), "first"),
        (lambda: Rule(spec=None, fed_by="softmx"), "softmax"),
        (lambda: Rule(spec=None, fed_by="layernorm"), "layer_norm"),
        (lambda: ScaleSearch(metric="hesian"), "hessian"),
        (lambda: Allocation(budget=Budget(mean_bits=4), method="greed"), "greedy"),
        (lambda: Reconstruction(scope="netwrk"), "network"),
    ],
)
def test_misspelt_values_get_the_nearest_value(make: Callable[[], object], nearest: str) -> None:
    with pytest.raises(UnknownKeyError, match=f"did you mean '{nearest}'"):
        make()


def test_misspelt_flags_of_backends_get_the_nearest_flag(quantized: fxquant.CompiledModel) -> None:
    text = r"'integer_onli'.*did you mean 'integer_only'\?"
    flags = ("integer_only", "float_products")
    with refused(LoweringError, text, got="integer_onli", expected=flags):
        quantized.lower("integer", integer_onli=True)


@pytest.mark.parametrize("value", [3, [], "qqqq"])
def test_values_far_from_any_get_no_suggestion(value: object) -> None:
    for make in (TensorSpec, lambda **fields: Rule(spec=None, **fields)):
        name = "scheme" if make is TensorSpec else "fed_by"
        with refused(UnknownKeyError, got=value) as caught:
            make(**{name: value})
        assert "did you mean" not in str(caught.value) and repr(value) in str(caught.value)

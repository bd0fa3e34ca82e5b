"""The uniform quantizer: ranges, rounding, gradients, and its operators in torch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from fxquant.config.spec import TensorSpec
from fxquant.errors import CalibrationError, FileFormatError
from fxquant.quantizers import UniformQuantizer, accumulator_scale, from_config, ops
from tests.helpers.quantizer_cases import RangeCase, uniform_cases
from tests.helpers.refusals import refused

# float32 without its subnormal numbers, which torch may flush to zero.
RANGE_ENDS = st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False)


@given(uniform_cases())
def test_zero_stays_zero(case: RangeCase) -> None:
    assert torch.equal(case.quantizer(torch.zeros_like(case.x)), torch.zeros_like(case.x))


@given(uniform_cases())
def test_error_within_the_range_is_at_most_half_a_step(case: RangeCase) -> None:
    lo, hi = case.along(case.lo.clamp(max=0)), case.along(case.hi.clamp(min=0))
    inside = torch.minimum(torch.maximum(case.x, lo), hi)
    error = (case.quantizer(inside) - inside).abs()
    # float32 rounding of x / scale is relative to the number of steps.
    slack = 1 + 2.0**case.quantizer.bits * 1e-6
    assert bool((error <= case.along(case.quantizer.scale) / 2 * slack).all())


@given(uniform_cases())
def test_gradient_is_that_of_the_identity_within_the_range_and_zero_outside(
    case: RangeCase,
) -> None:
    x = case.x.clone().requires_grad_()
    case.quantizer(x).sum().backward()
    lo, hi, step = map(
        case.along, (case.lo.clamp(max=0), case.hi.clamp(min=0), case.quantizer.scale)
    )
    well_inside = (case.x > lo + step) & (case.x < hi - step)
    # Symmetric codes may reach further than the range on one side.
    reach = torch.maximum(-lo, hi) * 1.0 + 2 * step if case.quantizer.signed else 0 * step
    low, high = torch.minimum(lo - 2 * step, -reach), torch.maximum(hi + 2 * step, reach)
    outside = (case.x < low) | (case.x > high)
    assert x.grad is not None
    assert bool((x.grad[well_inside] == 1).all())
    assert bool((x.grad[outside] == 0).all())


@given(
    bits=st.integers(2, 16),
    symmetric=st.booleans(),
    lo=RANGE_ENDS,
    hi=RANGE_ENDS,
)
@example(bits=8, symmetric=False, lo=0.0, hi=0.0)
@example(bits=8, symmetric=True, lo=0.0, hi=0.0)
@example(bits=4, symmetric=False, lo=0.7, hi=0.7)
@example(bits=4, symmetric=True, lo=-0.7, hi=-0.7)
@example(bits=2, symmetric=False, lo=-1e-38, hi=1e-38)
@example(bits=16, symmetric=True, lo=-1e-45, hi=1e-38)
@example(bits=16, symmetric=False, lo=-1e30, hi=1e30)
def test_any_range_gives_a_usable_quantizer(
    bits: int, symmetric: bool, lo: float, hi: float
) -> None:
    lo, hi = min(lo, hi), max(lo, hi)
    spec = TensorSpec(bits=bits, symmetric=symmetric)
    quantizer = UniformQuantizer.from_range(torch.tensor(lo), torch.tensor(hi), spec, None)
    x = torch.tensor([lo, hi, 0.0, (lo + hi) / 2])
    y = quantizer(x)
    assert bool(torch.isfinite(y).all())
    assert torch.equal(quantizer(y), y)
    assert y[2] == 0


@pytest.mark.parametrize("value", [0.7, -0.7, 1e-20, -1e20, 0.0])
@pytest.mark.parametrize("bits", [2, 8, 16])
def test_a_constant_asymmetric_range_represents_its_value(value: float, bits: int) -> None:
    constant = torch.tensor(value)
    quantizer = UniformQuantizer.from_range(constant, constant, TensorSpec(bits=bits), None)
    torch.testing.assert_close(quantizer(constant), constant, rtol=1e-6, atol=0.0)


def test_each_channel_has_its_own_scale() -> None:
    x = torch.tensor([[1.0, -1.0], [100.0, -100.0]])
    spec = TensorSpec(bits=8, symmetric=True)
    quantizer = UniformQuantizer.from_range(x.amin(1), x.amax(1), spec, 0)
    torch.testing.assert_close(quantizer(x), x, rtol=1e-2, atol=0.0)
    assert quantizer.scale[1] == 100 * quantizer.scale[0]


def test_rounding_is_half_to_even_as_onnx_defines_it() -> None:
    quantizer = UniformQuantizer(
        torch.tensor(1.0), torch.tensor(0.0), bits=8, signed=True, axis=None
    )
    codes = quantizer.quantize(torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5]))
    assert codes.tolist() == [0.0, 2.0, 2.0, 0.0, -2.0]


@pytest.mark.parametrize("scale", [0.0, -1.0, float("inf"), float("nan")])
def test_a_scale_must_be_finite_and_positive(scale: float) -> None:
    number = torch.tensor(scale)
    with refused(CalibrationError, "a scale is not finite and positive", got=number):
        UniformQuantizer(number, torch.tensor(0.0), bits=8, signed=True, axis=None)


def test_shapes_of_scale_and_axis_must_fit() -> None:
    with refused(CalibrationError, "do not fit together", got=((3,), (3,), None)):
        UniformQuantizer(torch.ones(3), torch.zeros(3), bits=8, signed=True, axis=None)
    with refused(CalibrationError, got=((3,), (2,), 0)):
        UniformQuantizer(torch.ones(3), torch.zeros(2), bits=8, signed=True, axis=0)


def test_a_config_of_another_version_is_refused() -> None:
    with refused(FileFormatError, r"'log3'.*upgrade", got="log3") as caught:
        from_config({"type": "log3"})
    assert "log" in caught.value.expected


def test_accumulator_scale_is_the_product_of_the_scales() -> None:
    activation = UniformQuantizer(
        torch.tensor(0.5), torch.tensor(3.0), bits=8, signed=False, axis=None
    )
    weight = UniformQuantizer(torch.tensor([1.0, 2.0]), torch.zeros(2), bits=8, signed=True, axis=0)
    assert accumulator_scale(activation, weight).tolist() == [0.5, 1.0]


@pytest.mark.parametrize("axis", [None, 1, -3])
def test_operators_keep_their_contract_with_torch(axis: int | None) -> None:
    x = torch.randn(2, 3, 4, 5)[..., ::2]  # not contiguous
    count = () if axis is None else (3,)
    scale, zero = torch.full(count, 0.1), torch.full(count, 7.0)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(ops.quantize, (x, scale, zero, 0, 15, axis), test_utils=checks)
    torch.library.opcheck(ops.fake_quantize, (x, scale, zero, 0, 15, axis), test_utils=checks)
    codes = ops.quantize(x, scale, zero, 0, 15, axis)
    torch.library.opcheck(ops.dequantize, (codes, scale, zero, axis), test_utils=checks)

"""The dynamic focusing quantizer: its interval, and the formula of the paper."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fxquant import TensorSpec
from fxquant.errors import CalibrationError
from fxquant.quantizers import DynamicFocusingQuantizer
from tests.helpers.quantizer_cases import Case, focusing_cases
from tests.helpers.refusals import refused


@given(focusing_cases())
def test_state_is_complete(case: Case[DynamicFocusingQuantizer]) -> None:
    again = DynamicFocusingQuantizer.from_config(case.quantizer.config())
    again.load_state_dict(case.quantizer.state_dict())
    assert again.start == case.quantizer.start


@given(focusing_cases())
def test_codes_are_those_of_the_paper(case: Case[DynamicFocusingQuantizer]) -> None:
    """0 below b1, the last above b2, between them round((x - b1) / step): eq. 15."""
    quantizer, x = case.quantizer, case.x.double()
    b1, b2 = quantizer.interval
    top = 2**quantizer.bits - 1
    steps = (x - b1) * top / (b2 - b1)
    inner = torch.where(x < b1, 0, torch.where(x > b2, top, steps.round())).float()
    off = quantizer.quantize(case.x) != inner
    near_tie = ((steps - steps.floor()) - 0.5).abs() < 1e-3
    assert bool(near_tie[off].all())


@given(focusing_cases())
def test_values_lie_on_the_plain_grid_of_8_bit_codes(case: Case[DynamicFocusingQuantizer]) -> None:
    """What makes a clip and one ordinary uniform quantizer of it."""
    quantizer = case.quantizer
    steps = quantizer(case.x) / quantizer.scale
    torch.testing.assert_close(steps, steps.round(), rtol=1e-6, atol=1e-4)
    assert steps.min() > quantizer.start - 0.5 and steps.max() < 255.5


@given(focusing_cases())
def test_each_value_goes_to_the_nearest_of_the_grid(case: Case[DynamicFocusingQuantizer]) -> None:
    """Values below b1 too, which are read as b1 and not as zero."""
    quantizer = case.quantizer
    grid = (quantizer.start + torch.arange(2**quantizer.bits)) * quantizer.scale
    nearest = (case.x.unsqueeze(-1) - grid).abs().amin(-1)
    error = (quantizer(case.x) - case.x).abs()
    torch.testing.assert_close(error, nearest, rtol=1e-4, atol=float(quantizer.scale) * 1e-3)


@given(focusing_cases())
def test_gradient_is_that_of_the_identity_within_the_interval_and_zero_outside(
    case: Case[DynamicFocusingQuantizer],
) -> None:
    x, quantizer = case.x.clone().requires_grad_(), case.quantizer
    quantizer(x).sum().backward()
    b1, b2 = quantizer.interval
    step = float(quantizer.scale)
    assert x.grad is not None
    assert bool((x.grad[(x > b1) & (x < b2)] == 1).all())
    assert bool((x.grad[(x < b1 - step) | (x > b2 + step)] == 0).all())


def test_an_interval_above_zero_spends_no_code_below_it() -> None:
    near_even = torch.linspace(0.012, 0.018, 200)  # attention of 65 tokens that is almost even
    focused = DynamicFocusingQuantizer.reaching(0.018, 30, bits=4)
    assert focused.interval == pytest.approx((0.012, 0.018))
    plain = DynamicFocusingQuantizer.reaching(0.018, 0, bits=4)
    errors = [float((q(near_even) - near_even).square().mean()) for q in (focused, plain)]
    assert errors[0] < errors[1] / 5


@given(bits=st.integers(2, 8), hi=st.floats(0, 100))
def test_any_range_gives_a_quantizer_that_covers_it(bits: int, hi: float) -> None:
    spec = TensorSpec(bits=bits, scheme="dynamic_focusing")
    quantizer = DynamicFocusingQuantizer.from_range(torch.tensor(0.0), torch.tensor(hi), spec, None)
    ends = torch.tensor([0.0, hi])
    assert bool(((quantizer(ends) - ends).abs() <= quantizer.scale).all())
    assert quantizer.start == 0


def test_bad_parameters_are_refused() -> None:
    scale = torch.tensor(0.0)
    with refused(CalibrationError, got=scale, expected="finite and positive"):
        DynamicFocusingQuantizer(scale, start=0, bits=4)
    text = "starts 0 to 240 steps above zero, got 241"
    with refused(CalibrationError, text, got=241, expected="0..240"):
        DynamicFocusingQuantizer(torch.tensor(1.0), start=241, bits=4)
    with refused(CalibrationError, got=1, expected="0..0"):
        DynamicFocusingQuantizer(torch.tensor(1.0), start=1, bits=8)
    with refused(CalibrationError, got=-1, expected="0..240"):
        DynamicFocusingQuantizer(torch.tensor(1.0), start=-1, bits=4)

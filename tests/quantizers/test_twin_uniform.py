"""The twin uniform quantizer: its code words, and the formula of the paper."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fxquant import TensorSpec
from fxquant.config.spec import Granularity, Scheme
from fxquant.errors import BitWidthError, CalibrationError, PolicyError
from fxquant.quantizers import TwinUniformQuantizer, ops
from tests.helpers.quantizer_cases import Case, twin_cases
from tests.helpers.refusals import refused


def grid(quantizer: TwinUniformQuantizer) -> Tensor:
    """All values that the quantizer can give."""
    magnitudes = torch.arange(quantizer.levels)
    fine = magnitudes * quantizer.scale * (-1 if quantizer.two_sided else 1)
    return torch.cat([fine, magnitudes * quantizer.coarse_scale])


@given(twin_cases())
def test_each_value_goes_to_the_nearest_of_both_grids(case: Case[TwinUniformQuantizer]) -> None:
    values = grid(case.quantizer)
    nearest = (case.x.unsqueeze(-1) - values).abs().amin(-1)
    error = (case.quantizer(case.x) - case.x).abs()
    # A coarse value inside the fine region is the fine grid's too, but for its last step.
    torch.testing.assert_close(error, nearest, rtol=1e-5, atol=float(case.quantizer.scale) * 1e-5)


@given(twin_cases())
def test_values_lie_on_a_plain_grid_of_the_fine_step(case: Case[TwinUniformQuantizer]) -> None:
    """What lets one integer product serve both regions: (a + b 2^m) D_R1."""
    quantizer = case.quantizer
    steps = quantizer(case.x) / quantizer.scale + quantizer.grid_zero_point
    torch.testing.assert_close(steps, steps.round(), rtol=1e-6, atol=1e-3)
    assert steps.min() > -0.5 and steps.max() < quantizer.grid_size - 0.5


@given(twin_cases())
def test_gradient_is_that_of_the_identity_within_the_range_and_zero_outside(
    case: Case[TwinUniformQuantizer],
) -> None:
    x, quantizer = case.x.clone().requires_grad_(), case.quantizer
    quantizer(x).sum().backward()
    values = grid(quantizer)
    inside = (x > values.min()) & (x < values.max())
    outside = (x < values.min() - quantizer.scale) | (x > values.max() + quantizer.coarse_scale)
    assert x.grad is not None
    assert bool((x.grad[inside] == 1).all()) and bool((x.grad[outside] == 0).all())


def test_code_words_are_region_and_magnitude() -> None:
    softmax = TwinUniformQuantizer(torch.tensor(1 / 64), shift=3, bits=4, two_sided=False)
    x = torch.tensor([0.0, 3 / 64, 7 / 64, 1 / 8, 0.5, 1.0])
    assert softmax.quantize(x).tolist() == [0, 3, 7, 8 + 1, 8 + 4, 8 + 7]
    assert softmax(x).tolist() == [0, 3 / 64, 7 / 64, 1 / 8, 0.5, 7 / 8]
    gelu = TwinUniformQuantizer(torch.tensor(0.025), shift=2, bits=4, two_sided=True)
    x = torch.tensor([-1.0, -0.05, 0.0, 0.01, 0.1, 9.0])
    assert gelu.quantize(x).tolist() == [7, 2, 0, 0, 8 + 1, 8 + 7]


def test_a_wide_gap_between_the_grids_is_split_in_the_middle() -> None:
    """The paper's cut at 2^(k-1) D_R1 would send 0.2 to 0."""
    quantizer = TwinUniformQuantizer(torch.tensor(0.01), shift=6, bits=3, two_sided=False)
    assert quantizer.coarse_scale == pytest.approx(0.64)
    low, high = quantizer(torch.tensor([0.2, 0.4])).tolist()
    assert low == pytest.approx(0.03) and high == pytest.approx(0.64)


@given(
    bits=st.integers(2, 8),
    lo=st.floats(-100, 0, allow_subnormal=False),
    hi=st.floats(0, 100, allow_subnormal=False),
    bound=st.none() | st.integers(1, 4),
)
def test_any_range_gives_a_quantizer_that_covers_it(
    bits: int, lo: float, hi: float, bound: int | None
) -> None:
    spec = TensorSpec(bits=bits, scheme=Scheme.TWIN_UNIFORM, max_shift=bound)
    quantizer = TwinUniformQuantizer.from_range(torch.tensor(lo), torch.tensor(hi), spec)
    ends = torch.tensor([lo, hi])
    step = torch.stack([quantizer.scale, quantizer.coarse_scale])
    assert bool(((quantizer(ends) - ends).abs() <= step * 1.001).all())
    assert bound is None or quantizer.shift <= bound
    assert quantizer(torch.zeros(())) == 0


def test_a_bound_on_the_shift_keeps_all_values_on_an_8_bit_grid() -> None:
    spec = TensorSpec(bits=6, scheme=Scheme.TWIN_UNIFORM)
    ends = torch.tensor(-0.17), torch.tensor(8.0)
    assert TwinUniformQuantizer.from_range(*ends, spec).grid_size > 256
    bounded = TensorSpec(bits=6, scheme=Scheme.TWIN_UNIFORM, max_shift=2)
    assert TwinUniformQuantizer.from_range(*ends, bounded).grid_size <= 256


def test_bad_parameters_are_refused() -> None:
    scale = torch.tensor(0.0)
    with refused(CalibrationError, "twin quantizer is one finite positive number", got=scale):
        TwinUniformQuantizer(scale, shift=1, bits=4, two_sided=True)
    with refused(CalibrationError, "too small: 0", got=0, expected=">= 1"):
        TwinUniformQuantizer(torch.tensor(1.0), shift=0, bits=4, two_sided=False)
    with refused(BitWidthError, got=9, expected="2..8"):
        TensorSpec(bits=9, scheme=Scheme.TWIN_UNIFORM)
    limits = (False, Granularity.TENSOR)
    with refused(PolicyError, got=(True, Granularity.TENSOR), expected=limits):
        TensorSpec(scheme=Scheme.TWIN_UNIFORM, symmetric=True)
    with refused(PolicyError, got=(False, Granularity.HEAD), expected=limits):
        TensorSpec(scheme=Scheme.TWIN_UNIFORM, granularity=Granularity.HEAD)
    with refused(PolicyError, got=Scheme.UNIFORM, expected=Scheme.TWIN_UNIFORM):
        TensorSpec(max_shift=3)


@pytest.mark.parametrize("two_sided", [False, True])
def test_operators_keep_their_contract_with_torch(two_sided: bool) -> None:
    x = torch.randn(2, 3, 4, 5)[..., ::2]  # not contiguous
    checks = ("test_schema", "test_faketensor")
    arguments = (x, torch.tensor(0.1), 2, 4, two_sided)
    torch.library.opcheck(ops.twin_quantize, arguments, test_utils=checks)
    torch.library.opcheck(ops.twin_fake_quantize, arguments, test_utils=checks)
    codes = ops.twin_quantize(*arguments)
    torch.library.opcheck(ops.twin_dequantize, (codes, *arguments[1:]), test_utils=checks)

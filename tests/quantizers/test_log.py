"""Logarithmic quantizers: the formula of the paper, the table and the shift."""

from __future__ import annotations

import math

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fxquant.errors import CalibrationError
from fxquant.quantizers import LogQuantizer, log_ops
from tests.helpers.quantizer_cases import Case, log_cases
from tests.helpers.refusals import refused

octaves = (
    st.tuples(st.integers(1, 24), st.integers(1, 16))
    .map(lambda pair: (pair[0] // math.gcd(*pair), pair[1] // math.gcd(*pair)))
    .filter(lambda pair: pair[0] / pair[1] <= 4)
)


def powers(quantizer: LogQuantizer) -> Tensor:
    """The exact powers that the codes before that of zero stand for."""
    codes = torch.arange(quantizer.zero_code, dtype=torch.float64)
    return quantizer.scale.double() * 2.0 ** (-codes * quantizer.n / quantizer.d)


@given(log_cases())
def test_codes_are_whole_numbers_of_their_bits(case: Case[LogQuantizer]) -> None:
    assert case.quantizer.quantize(case.x).max() <= case.quantizer.zero_code
    assert case.quantizer.zero_code < 2**case.quantizer.bits


@given(log_cases())
def test_codes_are_those_of_the_paper(case: Case[LogQuantizer]) -> None:
    """``clamp(round(-(d / n) log2(x / s)))`` down to the smallest power, half of which is zero."""
    quantizer, x = case.quantizer, case.x.double()
    own, smallest = quantizer.quantize(case.x), float(powers(quantizer)[-1])
    assert bool((own[x < smallest / 2] == quantizer.zero_code).all())
    steps = -torch.log2(x / quantizer.scale.double()) * quantizer.d / quantizer.n
    expected = steps.round().clamp(0, quantizer.zero_code - 1)
    off = (own != expected) & (x > smallest / 2 * (1 + 1e-6))
    near_tie = ((steps - steps.floor()) - 0.5).abs() < 1e-4
    assert bool(near_tie[off].all())


@given(log_cases())
def test_values_are_powers_as_near_as_the_table_has_them(case: Case[LogQuantizer]) -> None:
    quantizer = case.quantizer
    codes = torch.arange(quantizer.zero_code + 1).float()
    values = quantizer.dequantize(codes)
    # Half a unit of the smallest entry of the table, 65.
    torch.testing.assert_close(values[:-1].double(), powers(quantizer), rtol=0.5 / 64, atol=0)
    assert values[0] == quantizer.scale and values[-1] == 0
    assert bool((values.diff() < 0).all())
    assert powers(quantizer)[-1] >= quantizer.scale * 2.0**-16


@given(log_cases())
def test_a_code_decodes_by_a_table_and_a_shift(case: Case[LogQuantizer]) -> None:
    quantizer = case.quantizer
    table = log_ops.log_table(quantizer.d)
    assert len(table) == quantizer.d <= 16 and max(table) <= 128
    depth = log_ops.log_depth(*quantizer.form)
    for code, magnitude in enumerate(quantizer.magnitudes[:-1]):
        shift, rest = divmod(code * quantizer.n, quantizer.d)
        assert magnitude == table[rest] << (depth - shift)
    whole = torch.tensor(quantizer.magnitudes, dtype=torch.float64) * quantizer.unit.double()
    codes = torch.arange(quantizer.zero_code + 1).float()
    torch.testing.assert_close(quantizer.dequantize(codes).double(), whole, rtol=1e-6, atol=0)


@given(log_cases())
def test_gradient_is_that_of_the_identity_within_the_range_and_zero_outside(
    case: Case[LogQuantizer],
) -> None:
    x, quantizer = case.x.clone().requires_grad_(), case.quantizer
    quantizer(x).sum().backward()
    above = quantizer.scale * 2.0 ** (quantizer.n / quantizer.d)
    assert x.grad is not None
    assert bool((x.grad[(x >= 0) & (x < quantizer.scale)] == 1).all())
    assert bool((x.grad[(x < 0) | (x > above)] == 0).all())


def test_log2_of_three_bits() -> None:
    quantizer = LogQuantizer(torch.tensor(1.0), bits=3, n=1, d=1)
    x = torch.tensor([2.0, 1.0, 0.7, 0.5, 0.2, 1 / 64, 0.6 / 64, 0.4 / 64, 0.0])
    assert quantizer.quantize(x).tolist() == [0, 0, 1, 1, 2, 6, 6, 7, 7]
    assert quantizer(x).tolist() == [1.0, 1.0, 0.5, 0.5, 0.25, 1 / 64, 1 / 64, 0.0, 0.0]


def test_wide_codes_stop_sixteen_octaves_down() -> None:
    quantizer = LogQuantizer(torch.tensor(1.0), bits=8, n=1, d=1)
    assert quantizer.zero_code == 17 and quantizer.magnitudes[0] == 2**16
    fine = LogQuantizer(torch.tensor(1.0), bits=8, n=1, d=16)
    assert fine.zero_code == 255


def test_bad_parameters_are_refused() -> None:
    scale, lowest = torch.tensor(-1.0), "n / d in lowest terms, d at most 16"
    with refused(CalibrationError, "log quantizer is one finite positive number", got=scale):
        LogQuantizer(scale, bits=4, n=1, d=1)
    text = "lowest terms and d at most 16; got 2 / 4"
    with refused(CalibrationError, text, got=(2, 4), expected=lowest):
        LogQuantizer(torch.tensor(1.0), bits=4, n=2, d=4)
    with refused(CalibrationError, got=(1, 17), expected=lowest):
        LogQuantizer(torch.tensor(1.0), bits=4, n=1, d=17)


def test_operators_keep_their_contract_with_torch() -> None:
    x = torch.rand(2, 3, 4, 5)[..., ::2]  # not contiguous
    checks = ("test_schema", "test_faketensor")
    arguments = (x, torch.tensor(0.9), 4, 2, 3)
    torch.library.opcheck(log_ops.log_quantize, arguments, test_utils=checks)
    torch.library.opcheck(log_ops.log_fake_quantize, arguments, test_utils=checks)
    codes = log_ops.log_quantize(*arguments)
    torch.library.opcheck(log_ops.log_dequantize, (codes, *arguments[1:]), test_utils=checks)

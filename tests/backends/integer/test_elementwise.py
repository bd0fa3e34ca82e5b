"""Kernels of the integer-only form against exact or float64 references."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from fxquant.backends.integer.elementwise import IntAdd, IntMean, Lookup, table_of
from fxquant.backends.integer.kernels import Operand, affine_matmul, affine_whole
from fxquant.backends.integer.norm import IntNorm, int_sqrt
from fxquant.backends.integer.requantize import (
    Requantize,
    TwinRequantize,
    multiplier,
    rescale,
)
from fxquant.backends.integer.softmax import IntSoftmax
from fxquant.errors import LoweringError
from fxquant.quantizers import TwinUniformQuantizer, UniformQuantizer
from tests.helpers.refusals import refused

SCALES = st.floats(1e-4, 10.0)
SEEDS = st.integers(0, 2**32 - 1)


def quantizer(scale: float, zero: int = 0, bits: int = 8, signed: bool = False) -> UniformQuantizer:
    parameters = torch.tensor(scale), torch.tensor(float(zero))
    return UniformQuantizer(*parameters, bits=bits, signed=signed, axis=None)


def draw(seed: int, lo: int, hi: int, *shape: int) -> Tensor:
    return torch.randint(lo, hi + 1, shape, generator=torch.Generator().manual_seed(seed))


def scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


# Requantization


@given(
    ratio=st.floats(1e-12, 1e3) | st.floats(-1e3, -1e-12),
    acc=st.integers(-(2**31), 2**31),
)
@settings(max_examples=200, deadline=None)
def test_rescale_is_the_rounded_product_with_the_factor(ratio: float, acc: int) -> None:
    by = multiplier(scalar(ratio), 2**31)
    stands_for = Fraction(int(by.factor), 2 ** int(by.shift))
    assert by.drop == 0
    assert int(rescale(torch.tensor(acc), by)) == round(Fraction(acc) * stands_for)  # half to even
    least = abs(Fraction(ratio)) / 2**30 + Fraction(1, 2**62)
    assert abs(stands_for - Fraction(ratio)) <= least


def test_ties_go_to_even_on_both_sides_of_zero() -> None:
    acc = torch.arange(-7, 8)
    expected = torch.round(acc.double() / 2).to(torch.int64)
    assert rescale(acc, multiplier(scalar(0.5), 2**20)).tolist() == expected.tolist()
    assert expected.tolist()[:4] == [-4, -3, -2, -2]


@given(bits=st.integers(1, 61), code=st.floats(0.1, 2**16))
@settings(max_examples=100, deadline=None)
def test_the_largest_accumulators_do_not_overflow(bits: int, code: float) -> None:
    bound = 2**bits - 1
    ratio = code / bound
    by = multiplier(scalar(ratio), bound)
    for acc in (bound, -bound, bound - 1):
        assert abs(int(rescale(torch.tensor(acc), by)) - acc * ratio) <= 0.51


@pytest.mark.parametrize(
    ("ratio", "bound"), [(1.0, 2**50), (math.inf, 1), (2.0**40, 2**20), (1e-9, 2**63)], ids=str
)
def test_what_passes_64_bits_is_refused(ratio: float, bound: int) -> None:
    text = f"^accumulators up to {bound} times .* pass 64 bits"
    with refused(LoweringError, text, got=bound):
        multiplier(scalar(ratio), bound)


def requantize(ratio: Tensor, zero: Tensor, axis: int | None = None) -> Requantize:
    ends = (0, 255)
    return Requantize(ratio, zero, axis=axis, bound=2**31 - 1, ends=ends, dtype=torch.uint8)


def test_codes_end_at_both_ends_of_their_range() -> None:
    module = requantize(scalar(0.01), torch.tensor(7.0))
    acc = torch.tensor([-(2**31) + 1, -701, -700, 0, 24800, 24801, 2**31 - 1])
    assert module(acc).tolist() == [0, 0, 0, 7, 255, 255, 255]
    assert module(acc).dtype == torch.uint8


def test_each_channel_has_its_own_ratio_and_zero_point() -> None:
    module = requantize(torch.tensor([0.5, 0.25]).double(), torch.tensor([0.0, 3.0]), axis=-2)
    assert module(torch.tensor([[8, 12], [8, 12]])).tolist() == [[4, 6], [5, 6]]


@given(
    scale=SCALES,
    unit=st.floats(1e-7, 1e-5),
    shift=st.integers(1, 11),
    bits=st.integers(3, 8),
    two_sided=st.booleans(),
    seed=SEEDS,
)
@settings(max_examples=60, deadline=None)
def test_twin_words_equal_the_quantizers(
    scale: float, unit: float, shift: int, bits: int, two_sided: bool, seed: int
) -> None:
    twin = TwinUniformQuantizer(torch.tensor(scale), shift=shift, bits=bits, two_sided=two_sided)
    acc = draw(seed, -(2**30) if two_sided else 0, 2**30, 500)
    ratio = scalar(unit) / twin.scale.double()
    words = TwinRequantize(twin, ratio, axis=None, bound=2**30)(acc)
    exact = acc.double() * unit
    expected = twin.quantize(exact).to(torch.uint8)
    wrong = words != expected
    # A different word is a tie of either grid, or of the border of the regions.
    gap = (twin.dequantize(words.double()) - exact).abs() - (
        twin.dequantize(expected) - exact
    ).abs()
    assert bool((gap[wrong].abs() <= 1e-5 * exact[wrong].abs() + 1e-12).all())


def test_a_negative_factor_before_a_twin_quantizer_is_refused() -> None:
    twin = TwinUniformQuantizer(torch.tensor(0.1), shift=2, bits=8, two_sided=True)
    ratio = scalar(-1.0)
    with refused(LoweringError, "not positive", got=ratio, expected="> 0"):
        TwinRequantize(twin, ratio, axis=None, bound=8)


# Products


@given(seed=SEEDS, depth=st.integers(1, 300), bits=st.sampled_from([8, 16]))
@settings(max_examples=40, deadline=None)
def test_products_in_integers_equal_those_carried_by_floats(
    seed: int, depth: int, bits: int
) -> None:
    top, dtype = 2**bits - 1, torch.uint8 if bits == 8 else torch.int32
    zero = torch.tensor(top // 3, dtype=torch.int32)
    left = Operand(draw(seed, 0, top, 2, 3, depth).to(dtype), zero, top)
    right = Operand(draw(seed + 1, 0, top, 2, depth, 4).to(dtype), None, top)
    whole, carried = affine_whole(left, right), affine_matmul(left, right)
    assert not whole.is_floating_point()
    assert torch.equal(whole.long(), carried.long())


# Softmax


@given(seed=SEEDS, scale=SCALES, length=st.integers(1, 400), bits=st.sampled_from([2, 8, 12]))
@settings(max_examples=60, deadline=None)
def test_softmax_is_within_its_bound(seed: int, scale: float, length: int, bits: int) -> None:
    codes = draw(seed, 0, 2**bits - 1, 3, length)
    module = IntSoftmax(quantizer(scale, 5 % 2**bits, bits), -1)
    exact = torch.softmax(codes.double() * float(torch.tensor(scale)), -1)
    shares = module(codes)
    assert shares.dtype == torch.int64 and int(shares.max()) <= module.bound
    bound = (length + 1) * 2.0**-31 + 2.0**-25
    assert float((shares * module.scale - exact).abs().max()) <= bound * 1.0001


def test_softmax_runs_along_its_axis() -> None:
    codes = draw(0, 0, 255, 4, 5)
    across = IntSoftmax(quantizer(0.01), 0)(codes)
    assert torch.equal(across, IntSoftmax(quantizer(0.01), -1)(codes.t()).t())


# Norms


@given(root=st.integers(0, 2**31 - 1), extra=st.integers(-1, 1))
@settings(max_examples=200, deadline=None)
def test_the_square_root_is_exact(root: int, extra: int) -> None:
    value = max(root * root + extra, 0)
    assert int(int_sqrt(torch.tensor(value))) == math.isqrt(value)


@given(
    seed=SEEDS,
    scale=SCALES,
    width=st.sampled_from([1, 2, 7, 48, 768]),
    spread=st.integers(0, 255),
    centred=st.booleans(),
    eps=st.sampled_from([0.0, 1e-6, 1e-5]),
)
@settings(max_examples=80, deadline=None)
def test_norms_are_close_to_float64(
    seed: int, scale: float, width: int, spread: int, centred: bool, eps: float
) -> None:
    # Without eps a row of equal values has no norm in float.
    eps = eps or (1e-6 if width == 1 or spread == 0 else 0.0)
    q = quantizer(scale, 100)
    codes = draw(seed, 255 - spread, 255, 6, width)
    codes[:, 0] = 255 - spread
    codes[:, -1] = 255
    generator = torch.Generator().manual_seed(seed)
    weight, bias = torch.randn(2, width, generator=generator)
    bias = bias if centred else None
    module = IntNorm(q, (width,), weight, bias, eps=eps, centred=centred)
    values = (codes.double() - 100) * q.scale.double()
    if centred:
        assert bias is not None
        exact = functional.layer_norm(values, (width,), weight.double(), bias.double(), eps)
    else:
        exact = functional.rms_norm(values, (width,), weight.double(), eps)
    out = module(codes)
    assert out.dtype == torch.int64 and int(out.abs().max()) <= module.bound
    # Half a unit of the normalised value, its gain's rounding, and that of gamma and beta.
    size = float(weight.abs().max()) * (1 + math.sqrt(width))
    assert float((out * module.scale - exact).abs().max()) <= 2.0**-15 * size


def test_a_norm_over_two_axes() -> None:
    weight, q = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)), quantizer(0.1)
    codes = draw(1, 0, 255, 2, 3, 4)
    module = IntNorm(q, (3, 4), weight, None, eps=1e-5, centred=True)
    exact = functional.layer_norm(q.dequantize(codes.float()), (3, 4), weight, None, 1e-5)
    assert float((module(codes) * module.scale - exact).abs().max()) < 1e-4


def test_a_norm_whose_sums_pass_64_bits_is_refused() -> None:
    with refused(LoweringError, "norm over 4096 values of 16 bits", got=4096):
        IntNorm(quantizer(0.1, bits=16), (4096,), None, None, eps=0.0, centred=True)


# Sums, functions


@given(seed=SEEDS, scales=st.tuples(SCALES, SCALES), bits=st.sampled_from([4, 8, 16]))
@settings(max_examples=60, deadline=None)
def test_a_sum_is_exact_to_a_fraction_of_a_step(
    seed: int, scales: tuple[float, float], bits: int
) -> None:
    one, two = quantizer(scales[0], 3), quantizer(scales[1], 0, bits, signed=True)
    left, right = draw(seed, 0, 255, 4, 9), draw(seed + 1, two.qmin, two.qmax, 9)
    module = IntAdd(one, two)
    exact = (left.double() - 3) * one.scale.double() + right.double() * two.scale.double()
    total = module(left, right)
    assert int(total.abs().max()) <= module.bound
    step = max(float(one.scale), float(two.scale))
    assert float((total.double() * module.scale - exact).abs().max()) <= step * 2.0**-13


def test_sums_of_bytes_stay_in_32_bits() -> None:
    total = IntAdd(quantizer(0.1, 255), quantizer(0.2, 0))(draw(0, 0, 255, 9), draw(1, 0, 255, 9))
    assert total.dtype == torch.int32


def test_a_mean_is_a_sum() -> None:
    acc = torch.full((2, 5, 3), 2**31 - 1, dtype=torch.int32)
    assert IntMean((1,), keepdim=False)(acc).tolist() == [[5 * (2**31 - 1)] * 3] * 2
    assert IntMean((1,), keepdim=True)(acc).shape == (2, 1, 3)


@pytest.mark.parametrize("function", [functional.gelu, functional.silu, torch.tanh])
@pytest.mark.parametrize("signed", [False, True])
def test_a_function_of_codes_is_a_table(function, signed: bool) -> None:  # type: ignore[no-untyped-def]
    q = quantizer(0.05, 0 if signed else 99, signed=signed)
    codes = torch.arange(q.qmin, q.qmax + 1).to(torch.int8 if signed else torch.uint8)
    looked_up = Lookup(table_of(q, function), q.qmin)(codes)
    assert torch.equal(looked_up, function(q.dequantize(codes.float())))

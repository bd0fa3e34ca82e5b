import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from fxquant.backends.integer import kernels
from fxquant.backends.integer.convolve import Geometry, convolve
from fxquant.backends.integer.kernels import Operand, affine_int8, affine_matmul, int_matmul
from fxquant.backends.integer.modules import QuantizedOperand, ToCodes, bias_codes
from fxquant.errors import LoweringError
from fxquant.quantizers import UniformQuantizer
from tests.helpers.refusals import refused

RANGES = {"uint8": (torch.uint8, 0, 255), "int8": (torch.int8, -128, 127)}


def draw(generator, lo, hi, shape, extreme):
    """Codes over a whole range, or at its two ends only."""
    if extreme:
        return torch.tensor([lo, hi])[torch.randint(2, shape, generator=generator)]
    return torch.randint(lo, hi + 1, shape, generator=generator)


def centred(operand):
    zero = 0 if operand.zero_point is None else operand.zero_point.long()
    return operand.codes.long() - zero


@given(
    seed=st.integers(0, 2**32 - 1),
    shape=st.tuples(st.integers(1, 5), st.integers(1, 900), st.integers(1, 5)),
    types=st.tuples(st.sampled_from(sorted(RANGES)), st.sampled_from(sorted(RANGES))),
    zeros=st.tuples(st.booleans(), st.booleans()),
    extreme=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_all_paths_equal_the_int64_product(seed, shape, types, zeros, extreme):
    m, k, n = shape
    generator = torch.Generator().manual_seed(seed)
    operands = []
    for kind, sides, with_zero, zero_shape in zip(
        types, ((m, k), (k, n)), zeros, ((m, 1), (1, n)), strict=True
    ):
        dtype, lo, hi = RANGES[kind]
        codes = draw(generator, lo, hi, sides, extreme).to(dtype)
        zero = draw(generator, lo, hi, zero_shape, extreme).to(torch.int32) if with_zero else None
        operands.append(Operand(codes, zero, 255))
    expected = centred(operands[0]) @ centred(operands[1])
    for actual in (affine_matmul(*operands), affine_int8(*operands)):
        assert actual.dtype == torch.int32
        torch.testing.assert_close(actual.long(), expected, rtol=0, atol=0)
    plain = [operand.codes for operand in operands]
    expected = plain[0].long() @ plain[1].long()
    torch.testing.assert_close(int_matmul(*plain).long(), expected, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("a", "b"), list(itertools.product((-255, 255), (-128, 127, 255))))
def test_sums_at_the_ends_of_the_code_ranges_are_exact(a, b, dtype):
    left, right = torch.full((2, 2000), a, dtype=dtype), torch.full((2000, 3), b, dtype=dtype)
    product = kernels.product_float(left, right, (255, 255))
    assert product.dtype == torch.int32
    assert (product == a * b * 2000).all()


def test_a_float32_product_without_chunks_would_not_be_exact():
    left, right = torch.full((1, 4001), 255.0), torch.full((4001, 1), 255.0)
    right[0] = 254.0
    assert int(left @ right) != 255 * 255 * 4001 - 255
    assert kernels.product_float(left, right, (255, 255)).item() == 255 * 255 * 4001 - 255


@given(seed=st.integers(0, 2**32 - 1), depth=st.integers(1, 700), extreme=st.booleans())
@settings(max_examples=20, deadline=None)
def test_16_bit_codes_are_summed_in_int64(seed, depth, extreme):
    generator = torch.Generator().manual_seed(seed)
    a = draw(generator, -(2**15), 2**15 - 1, (2, 3, depth), extreme).to(torch.int16)
    b = draw(generator, 0, 2**16 - 1, (2, depth, 4), extreme).to(torch.int32)
    product = int_matmul(a, b, (2**15, 2**16 - 1))
    assert product.dtype == (torch.int64 if depth * 2**15 * (2**16 - 1) >= 2**31 else torch.int32)
    torch.testing.assert_close(product.long(), a.long() @ b.long(), rtol=0, atol=0)


def test_sums_that_could_pass_int32_are_int64():
    a, b = torch.full((1, 40_000), 255), torch.full((40_000, 1), 255)
    product = int_matmul(a, b, (255, 255))
    assert product.dtype == torch.int64
    assert product.item() == 255 * 255 * 40_000


def test_autocast_does_not_touch_the_product():
    a, b = torch.full((4, 300), 255, dtype=torch.uint8), torch.full((300, 4), 127).to(torch.int8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (int_matmul(a, b) == 255 * 127 * 300).all()


def test_bounds_that_float64_cannot_hold_are_refused():
    text = "float64 cannot hold"
    with refused(LoweringError, text, got=(2**31, 2**31), expected="codes of at most 16 bits"):
        int_matmul(torch.ones(2, 2, dtype=torch.int32), torch.ones(2, 2, dtype=torch.int32))


def test_the_int8_product_is_used_where_the_cpu_has_it(monkeypatch):
    calls = []
    monkeypatch.setattr(kernels, "cpu_multiplies_int8", lambda: True)
    monkeypatch.setattr(
        kernels, "product_int8", lambda a, b: calls.append(a.dtype) or (a.int() @ b.int())
    )
    a, b = torch.full((3, 5, 8), 200, dtype=torch.uint8), torch.full((8, 4), -7, dtype=torch.int8)
    product = affine_matmul(Operand(a, torch.tensor(3).int(), 255), Operand(b, None, 128))
    assert calls == [torch.int8]
    assert (product == 197 * -7 * 8).all()
    batched = int_matmul(b.new_ones(2, 4, 8), b.new_ones(2, 8, 4))
    assert (batched == 8).all() and len(calls) == 1  # torch's product has no batch axis


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [({"avx2": True}, False), ({"avx512_vnni": True}, True), ({"amx_int8": True}, True)],
)
def test_the_cpu_is_asked_for_int8(monkeypatch, capabilities, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert kernels.cpu_multiplies_int8() is expected


def test_a_torch_without_the_query_falls_back(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: True, raising=False)
    assert kernels.cpu_multiplies_int8()
    monkeypatch.delattr(torch.cpu, "_is_vnni_supported")
    assert not kernels.cpu_multiplies_int8()


CONVS = [
    # input, weight, stride, padding, dilation, groups
    ((2, 3, 9), (4, 3, 3), 2, 1, 1, 1),
    ((2, 6, 9), (4, 3, 3), 1, 2, 2, 2),
    ((2, 3, 9, 8), (4, 3, 3, 2), (2, 1), (1, 0), (1, 2), 1),
    ((1, 4, 9, 8), (8, 1, 3, 3), 2, 1, 2, 4),
    ((1, 4, 7), (4, 1, 3), 2, 1, 1, 4),
    ((1, 2, 5, 6, 7), (4, 2, 2, 3, 2), 2, 1, 1, 1),
    ((1, 4, 5, 6, 7), (4, 1, 3, 3, 3), 1, 1, 1, 4),
]


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("case", CONVS, ids=str)
def test_a_convolution_equals_that_of_the_centred_codes(monkeypatch, case, native):
    monkeypatch.setattr(kernels, "cpu_multiplies_int8", lambda: native)
    shape, weight_shape, stride, padding, dilation, groups = case
    n = len(shape) - 2
    spread = lambda v: v if isinstance(v, tuple) else (v,) * n  # noqa: E731
    x = Operand(torch.randint(0, 256, shape).to(torch.uint8), torch.tensor(77).int(), 255)
    zero = torch.randint(0, 256, (weight_shape[0], *[1] * (n + 1))).int()
    weight = Operand(torch.randint(0, 256, weight_shape).to(torch.uint8), zero, 255)
    geometry = Geometry(
        stride=spread(stride),
        padding=tuple((p, p) for p in spread(padding)),
        dilation=spread(dilation),
        groups=groups,
    )
    conv = (functional.conv1d, functional.conv2d, functional.conv3d)[n - 1]
    expected = conv(
        centred(x).double(), centred(weight).double(), None, stride, padding, dilation, groups
    )
    product = convolve(x, weight, geometry)
    assert product.dtype == torch.int32
    torch.testing.assert_close(product.double(), expected, rtol=0, atol=0)


@pytest.mark.parametrize("bits", [2, 4, 8, 9, 15, 16])
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("axis", [None, -3])
def test_codes_equal_those_of_the_quantizer(bits, signed, axis):
    shape = () if axis is None else (3,)
    zero = torch.zeros(shape) if signed else torch.full(shape, 2.0 ** (bits - 1) - 1)
    quantizer = UniformQuantizer(
        torch.rand(shape) + 0.01, zero, bits=bits, signed=signed, axis=axis
    )
    x = torch.randn(2, 3, 50, 4) * 2.0**bits * 0.3
    codes = ToCodes(quantizer)(x)
    assert not codes.is_floating_point()
    torch.testing.assert_close(codes.float(), quantizer.quantize(x), rtol=0, atol=0)
    assert (codes.long() - zero.view(-1, 1, 1).long()).abs().max() <= QuantizedOperand(
        quantizer, axis
    ).bound


def test_a_bias_off_the_grid_stays_float():
    unit = torch.tensor([0.5, 0.25])
    assert bias_codes(torch.tensor([1.5, -1.0]), unit, 100).tolist() == [3, -4]
    assert bias_codes(torch.tensor([1.6, -1.0]), unit, 100) is None
    assert bias_codes(torch.tensor([2.0**31, 0.0]), unit, 100) is None
    assert bias_codes(torch.tensor([2.0**29, 0.0]), unit, 2**30 - 1).dtype == torch.int32
    assert bias_codes(torch.tensor([2.0**29, 0.0]), unit, 2**30).dtype == torch.int64

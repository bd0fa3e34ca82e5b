"""Products of integer codes, exact to the last bit.

``int_matmul(a, b)`` is the plain product of two integer tensors; ``affine_matmul`` is the product
of codes with zero points, ``sum_k (a - z_a)(b - z_b)``; ``sum_products`` adds several of these,
shifted. Each product is computed in one of three ways, all exact:

- *int8*: torch's int8 product, where the device has instructions for it. It sums in int32.
- *float32*: the sum over K is cut into chunks in which no partial sum can exceed 2^24. Up to this
  bound float32 represents every whole number, so that products and sums are exact in any order in
  which the GEMM computes them. Chunks are added as integers. Operands are at most 256 in magnitude,
  which even bfloat16 and TF32 represent: settings that let a GEMM round its operands to these types
  change nothing, since the GEMM still sums in float32.
- *float64*: the same with 2^53, for codes of more than 8 bits.

Accumulators are int32 where the bound of the operands proves that they fit, else int64.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fxquant.errors import LoweringError
from fxquant.quantizers import INT32_MAX

# Largest n such that the type represents every whole number up to n in magnitude.
_LARGEST_EXACT = {torch.float32: 2**24, torch.float64: 2**53}
# The same for bfloat16, to which torch may round the operands of a float32 product.
_LARGEST_EXACT_BFLOAT16 = 2**8
# With K below this bound, the int8 product and each correction for zero points is below 2^29.
_INT8_DEPTH_BOUND = 2**15


class Operand(NamedTuple):
    """Codes and their zero point: they represent ``codes - zero_point`` in units of a scale.

    Attributes:
        codes: integers, ``(..., M, K)`` on the left, ``(..., K, N)`` on the right.
        zero_point: int32, broadcasting against codes and of length one along K; None for zero.
        bound: largest possible magnitude of ``codes - zero_point``.
    """

    codes: Tensor
    zero_point: Tensor | None
    bound: int


# An operand as a sum of terms: operands, each with the exponent of the power of two that multiplies
# it. At every position at most one term is not zero. A uniform quantizer has one term, a twin
# quantizer one for each region.
Terms = tuple[tuple[Operand, int], ...]
# An exact product of two operands.
Multiply = Callable[[Operand, Operand], Tensor]


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def cpu_multiplies_int8() -> bool:
    """Whether this CPU has int8 dot products (VNNI or AMX).

    Without these instructions torch's int8 product is some 80 times slower than its float32
    product. On older vector units the int8 product may also saturate, so it is not used there.
    """
    query = getattr(torch.cpu, "get_capabilities", None)
    if query is not None:
        capabilities = query()
        return any(bool(capabilities.get(name)) for name in ("avx512_vnni", "avx_vnni", "amx_int8"))
    # Older versions of torch have only this private function, which may be missing as well.
    vnni = getattr(torch.cpu, "_is_vnni_supported", None)
    return bool(vnni()) if vnni is not None else False


def accumulator_dtype(bound: int) -> torch.dtype:
    """Type of sums that are at most ``bound`` in magnitude: int32 or int64."""
    return torch.int32 if bound <= INT32_MAX else torch.int64


def int_matmul(a: Tensor, b: Tensor, bounds: tuple[int, int] | None = None) -> Tensor:
    """Exact ``a @ b`` of integer tensors.

    Args:
        a: integers, ``(..., M, K)``.
        b: integers, ``(..., K, N)``; leading axes broadcast.
        bounds: largest magnitudes in ``a`` and ``b``; None: the largest of their types.

    Returns:
        ``(..., M, N)``, int32 where K and the bounds prove that no sum overflows, else int64.

    Raises:
        LoweringError: the bounds exceed 16-bit codes, so that float64 cannot represent a product.
    """
    bounds = bounds or (_magnitude(a.dtype), _magnitude(b.dtype))
    if a.dtype == b.dtype == torch.int8 and _runs_int8(a, b):
        return product_int8(a, b)
    dtype = _float_dtype(bounds)
    return product_float(a.to(dtype), b.to(dtype), bounds)


def affine_matmul(a: Operand, b: Operand) -> Tensor:
    """Exact ``(a.codes - a.zero_point) @ (b.codes - b.zero_point)``.

    Returns:
        ``(..., M, N)``, int32 or int64 as in :func:`int_matmul`.
    """
    if _is_byte(a.codes) and _is_byte(b.codes) and _runs_int8(a.codes, b.codes):
        return affine_int8(a, b)
    bounds = (a.bound, b.bound)
    dtype = _float_dtype(bounds)
    return product_float(_centred(a, dtype), _centred(b, dtype), bounds)


def affine_whole(a: Operand, b: Operand) -> Tensor:
    """Computes :func:`affine_matmul` in integers alone: in int8, or in plain int32 or int64.

    Torch's plain integer product is some three times slower than its float32 product, and GPUs do
    not have it.
    """
    if _is_byte(a.codes) and _is_byte(b.codes) and _runs_int8(a.codes, b.codes):
        return affine_int8(a, b)
    dtype = accumulator_dtype(a.codes.shape[-1] * max(a.bound * b.bound, 1))
    return torch.matmul(_centred(a, dtype), _centred(b, dtype))


def sum_products(left: Terms, right: Terms, multiply: Multiply, depth: int) -> Tensor:
    """Exact product of sums, ``sum multiply(a, b) 2^(m + n)`` over terms ``(a, m)``, ``(b, n)``.

    The products are shifted and added as integers, which is the integer form of the twin quantizer
    (arXiv 2111.12293, section 4.2).

    Args:
        left: terms of the left operand.
        right: terms of the right operand.
        multiply: exact product of two operands.
        depth: number of products of codes that each entry of the result sums.

    Returns:
        int32 where the bounds prove that no sum overflows, else int64.
    """
    # At most one term of an operand is not zero at any position, so the largest bound holds.
    bounds = [max(term.bound << shift for term, shift in terms) for terms in (left, right)]
    accumulator = accumulator_dtype(depth * bounds[0] * bounds[1])
    total: Tensor | None = None
    for (a, m), (b, n) in itertools.product(left, right):
        product = multiply(a, b).to(accumulator)
        product = product << (m + n) if m + n else product
        total = product if total is None else total + product
    assert total is not None
    return total


def product_float(a: Tensor, b: Tensor, bounds: tuple[int, int]) -> Tensor:
    """Exact ``a @ b`` of whole numbers held as floats, in chunks along K.

    Args:
        a: whole numbers, ``(..., M, K)``, float32 or float64.
        b: whole numbers, ``(..., K, N)``, of the same type.
        bounds: largest magnitudes in ``a`` and ``b``; for float32 at most 256 each.
    """
    depth, largest = a.shape[-1], max(bounds[0] * bounds[1], 1)
    length = _LARGEST_EXACT[a.dtype] // largest
    accumulator = accumulator_dtype(depth * largest)
    # Under autocast the product would be rounded to a half-precision type.
    with torch.autocast(a.device.type, enabled=False):
        total = torch.matmul(a[..., :length], b[..., :length, :]).to(accumulator)
        for start in range(length, depth, length):
            stop = start + length
            chunk_product = torch.matmul(a[..., start:stop], b[..., start:stop, :])
            total = total + chunk_product.to(accumulator)
    return total


def product_int8(a: Tensor, b: Tensor) -> Tensor:
    """Computes ``a @ b`` of int8 ``(..., M, K)`` and ``(K, N)`` by torch's int8 product, int32."""
    product = torch._int_mm(a.reshape(-1, a.shape[-1]), b)
    return product.reshape(*a.shape[:-1], b.shape[-1])


def affine_int8(a: Operand, b: Operand) -> Tensor:
    """Computes :func:`affine_matmul` by the int8 product; zero points are subtracted afterwards.

    ``sum (a - z_a)(b - z_b) = sum a b - z_a sum b - z_b sum a + K z_a z_b``, all in int32.
    """
    left, left_zero = _as_int8(a)
    right, right_zero = _as_int8(b)
    total = product_int8(left, right)
    if left_zero is not None:
        total = total - left_zero * right.sum(-2, keepdim=True, dtype=torch.int32)
    if right_zero is not None:
        total = total - right_zero * left.sum(-1, keepdim=True, dtype=torch.int32)
    if left_zero is not None and right_zero is not None:
        total = total + left.shape[-1] * left_zero * right_zero
    return total


def _as_int8(operand: Operand) -> tuple[Tensor, Tensor | None]:
    """Codes and zero point as int8; both are lowered by 128 where the codes are unsigned."""
    codes, zero = operand.codes, operand.zero_point
    if codes.dtype == torch.int8:
        return codes, zero
    # Flipping the top bit of a byte and reading the byte as signed subtracts 128.
    codes = torch.bitwise_xor(codes.view(torch.int8), -128)
    if zero is None:
        return codes, torch.full((), -128, dtype=torch.int32, device=codes.device)
    return codes, zero - 128


def _centred(operand: Operand, dtype: torch.dtype) -> Tensor:
    codes = operand.codes.to(dtype)
    return codes if operand.zero_point is None else codes - operand.zero_point.to(dtype)


def _float_dtype(bounds: tuple[int, int]) -> torch.dtype:
    if max(bounds) <= _LARGEST_EXACT_BFLOAT16:
        return torch.float32
    if bounds[0] * bounds[1] > _LARGEST_EXACT[torch.float64]:
        raise LoweringError(
            f"int_matmul got operands of magnitudes up to {bounds[0]} and {bounds[1]}, whose "
            "products float64 cannot hold; pass the bounds of the codes (at most 16 bits)",
            got=bounds,
            expected="codes of at most 16 bits",
        )
    return torch.float64


def _magnitude(dtype: torch.dtype) -> int:
    return -torch.iinfo(dtype).min or torch.iinfo(dtype).max


def _is_byte(codes: Tensor) -> bool:
    return codes.dtype in (torch.int8, torch.uint8)


def _runs_int8(a: Tensor, b: Tensor) -> bool:
    """Whether torch's int8 product supports ``a @ b`` on this device and is fast."""
    depth, width = b.shape[-2], b.shape[-1]
    if b.ndim != 2 or not 0 < depth < _INT8_DEPTH_BOUND:
        return False
    if a.device.type == "cuda":
        # Conditions of torch._int_mm on CUDA.
        rows = a.numel() // depth
        return rows > 16 and depth % 8 == 0 and width % 8 == 0
    return a.device.type == "cpu" and bool(cpu_multiplies_int8())

"""The torch operators of logarithmic quantizers, and the whole numbers that their grid is made of.

A code ``c`` stands for ``s 2^(-c n / d)``. With ``c n = d shift + rest`` that is a table of ``d``
entries for ``2^(-rest / d)`` and a right shift. The table holds whole numbers, in the simulation as
well, so that integer kernels have the very same values.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Fraction bits of the table: its entries, 65 to 128, fit a byte, and stay apart up to d = 16.
_FRACTION = 7
# Values lie down to 2^-16 of the largest. Further down nothing is left of an attention weight, and
# wider whole numbers would be the operands of a product.
_DEPTH = 16


def log_powers(bits: int, n: int, d: int) -> int:
    """Number of codes that stand for powers; the code of this number stands for zero.

    One code of ``2^bits`` is zero's; wide codes have more than there are powers within the depth.
    """
    return min((1 << bits) - 1, _DEPTH * d // n + 1)


def log_depth(bits: int, n: int, d: int) -> int:
    """The shift of the smallest power."""
    return (log_powers(bits, n, d) - 1) * n // d


def log_table(d: int) -> list[int]:
    """``2^(-i / d)`` for each ``i < d`` as whole numbers, the first a power of two."""
    return [1] if d == 1 else [round(2.0 ** (_FRACTION - i / d)) for i in range(d)]


def log_magnitudes(bits: int, n: int, d: int) -> list[int]:
    """The value of each code as whole numbers, zero's the last; the first stands for the scale."""
    table, depth = log_table(d), log_depth(bits, n, d)
    steps = (code * n for code in range(log_powers(bits, n, d)))
    return [*(table[step % d] << (depth - step // d) for step in steps), 0]


def log_borders(bits: int, n: int, d: int) -> list[float]:
    """Where the places of codes meet, as shares of the scale, ascending.

    Between powers where the exponent is half-way, so that codes are ``round(-(d / n) log2(x / s))``
    (arXiv 2407.12951); between the smallest and zero at half the smallest, which is nearer to
    neither.
    """
    count = log_powers(bits, n, d)
    smallest = 2.0 ** (-(count - 1) * n / d)
    return [smallest / 2, *(2.0 ** (-(code + 0.5) * n / d) for code in reversed(range(count - 1)))]


def _borders(x: Tensor, scale: Tensor, bits: int, n: int, d: int) -> Tensor:
    borders = torch.tensor(log_borders(bits, n, d), dtype=x.dtype, device=x.device)
    return borders * scale.to(x.dtype)


def _values(scale: Tensor, bits: int, n: int, d: int, dtype: torch.dtype) -> Tensor:
    steps = torch.tensor(log_magnitudes(bits, n, d), dtype=dtype, device=scale.device)
    return steps * (scale.to(dtype) / steps[0])


@torch.library.custom_op("fxquant::log_quantize", mutates_args=())
def log_quantize(x: Tensor, scale: Tensor, bits: int, n: int, d: int) -> Tensor:
    """Codes of the logarithmic quantizer (``quantizers.LogQuantizer``).

    Args:
        x: float tensor of any shape.
        scale: ``s``, the largest value, ``()``, positive.
        bits: bit-width of the codes.
        n: see d.
        d: ``n / d`` is the number of octaves from one code to the next, in lowest terms.

    Returns:
        Codes as whole numbers in the dtype of ``x``: 0 for ``s``, ``log_powers`` for zero.
    """
    places = torch.bucketize(x.contiguous(), _borders(x, scale, bits, n, d))
    return (log_powers(bits, n, d) - places).to(x.dtype)


@torch.library.custom_op("fxquant::log_dequantize", mutates_args=())
def log_dequantize(codes: Tensor, scale: Tensor, bits: int, n: int, d: int) -> Tensor:
    """Values of codes; arguments as in :func:`log_quantize`."""
    return _values(scale, bits, n, d, codes.dtype)[codes.to(torch.int64)]


@torch.library.custom_op("fxquant::log_fake_quantize", mutates_args=())
def log_fake_quantize(x: Tensor, scale: Tensor, bits: int, n: int, d: int) -> Tensor:
    """``log_dequantize(log_quantize(x))`` in one operator; arguments as there.

    The gradient is the straight-through estimate: that of the identity from zero to half a code
    above the scale, zero outside, for ``x`` alone.
    """
    ascending = _values(scale, bits, n, d, x.dtype).flip(0)
    return ascending[torch.bucketize(x.contiguous(), _borders(x, scale, bits, n, d))]


@log_quantize.register_fake
def _(x: Tensor, scale: Tensor, bits: int, n: int, d: int) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@log_dequantize.register_fake
def _(codes: Tensor, scale: Tensor, bits: int, n: int, d: int) -> Tensor:
    return torch.empty_like(codes, memory_format=torch.contiguous_format)


@log_fake_quantize.register_fake
def _(x: Tensor, scale: Tensor, bits: int, n: int, d: int) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _save_range(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, scale, _, n, d = inputs
    ctx.save_for_backward((x >= 0) & (x <= scale * 2.0 ** (n / d / 2)))


def _straight_through(ctx, grad):  # type: ignore[no-untyped-def]
    (inside,) = ctx.saved_tensors
    return grad * inside, None, None, None, None


log_fake_quantize.register_autograd(_straight_through, setup_context=_save_range)

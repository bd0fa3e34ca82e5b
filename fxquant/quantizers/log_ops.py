"""Torch operators of logarithmic quantizers, and the whole numbers that form their grid.

A code ``c`` represents ``s 2^(-c n / d)``. With ``c n = d shift + rest`` this is an entry of a
table of ``d`` entries ``2^(-rest / d)``, shifted right by ``shift``. The table holds whole numbers,
in the simulation as well, so that integer kernels compute with exactly the same values.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Fraction bits of the table: its entries, 65 to 128, fit a byte and are distinct up to d = 16.
_TABLE_FRACTION_BITS = 7
# Octaves from the largest value to the smallest power, 2^-16 of it. Smaller attention weights do
# not matter, and smaller powers would need wider whole numbers as operands of a product.
_OCTAVES_COVERED = 16


def log_powers(bits: int, n: int, d: int) -> int:
    """Number of codes that represent powers; the code with this number represents zero.

    One of the ``2^bits`` codes represents zero. Wide codes have more values than there are powers
    within the 16 octaves.
    """
    return min((1 << bits) - 1, _OCTAVES_COVERED * d // n + 1)


def log_depth(bits: int, n: int, d: int) -> int:
    """Right shift of the smallest power."""
    return (log_powers(bits, n, d) - 1) * n // d


def log_table(d: int) -> list[int]:
    """Table of ``2^(-i / d)`` for ``i < d`` as whole numbers; the first is a power of two."""
    return [1] if d == 1 else [round(2.0 ** (_TABLE_FRACTION_BITS - i / d)) for i in range(d)]


def log_magnitudes(bits: int, n: int, d: int) -> list[int]:
    """Values of all codes as whole numbers: first that of the scale, last that of zero."""
    table, depth = log_table(d), log_depth(bits, n, d)
    steps = (code * n for code in range(log_powers(bits, n, d)))
    return [*(table[step % d] << (depth - step // d) for step in steps), 0]


def log_borders(bits: int, n: int, d: int) -> list[float]:
    """Borders between neighbouring codes, as shares of the scale, ascending.

    The border between two powers has the exponent half-way between them, so that codes are
    ``round(-(d / n) log2(x / s))`` (arXiv 2407.12951). The border between the smallest power and
    zero is half that power, at equal distance from both.
    """
    count = log_powers(bits, n, d)
    smallest = 2.0 ** (-(count - 1) * n / d)
    return [smallest / 2, *(2.0 ** (-(code + 0.5) * n / d) for code in reversed(range(count - 1)))]


def _borders(x: Tensor, scale: Tensor, bits: int, n: int, d: int) -> Tensor:
    """Borders between codes in the dtype of ``x``."""
    borders = torch.tensor(log_borders(bits, n, d), dtype=x.dtype, device=x.device)
    return borders * scale.to(x.dtype)


def _values(scale: Tensor, bits: int, n: int, d: int, dtype: torch.dtype) -> Tensor:
    """Values of all codes up to the code of zero."""
    steps = torch.tensor(log_magnitudes(bits, n, d), dtype=dtype, device=scale.device)
    return steps * (scale.to(dtype) / steps[0])


@torch.library.custom_op("fxquant::log_quantize", mutates_args=())
def log_quantize(x: Tensor, scale: Tensor, bits: int, n: int, d: int) -> Tensor:
    """Codes of the logarithmic quantizer (``quantizers.LogQuantizer``).

    Args:
        x: float tensor of any shape.
        scale: ``s``, the largest value, ``()``, positive.
        bits: bit-width of the codes.
        n: numerator of ``n / d``, the number of octaves from one code to the next.
        d: denominator of ``n / d``, in lowest terms.

    Returns:
        Codes as whole numbers in the dtype of ``x``: 0 for ``s``, ``log_powers`` for zero.
    """
    places = torch.bucketize(x.contiguous(), _borders(x, scale, bits, n, d))
    return (log_powers(bits, n, d) - places).to(x.dtype)


@torch.library.custom_op("fxquant::log_dequantize", mutates_args=())
def log_dequantize(codes: Tensor, scale: Tensor, bits: int, n: int, d: int) -> Tensor:
    """Values of codes; the other arguments are those of :func:`log_quantize`."""
    return _values(scale, bits, n, d, codes.dtype)[codes.to(torch.int64)]


@torch.library.custom_op("fxquant::log_fake_quantize", mutates_args=())
def log_fake_quantize(x: Tensor, scale: Tensor, bits: int, n: int, d: int) -> Tensor:
    """Rounds to the grid: ``log_dequantize(log_quantize(x))`` in one operator.

    The arguments are those of :func:`log_quantize`. Only ``x`` has a gradient, the straight-through
    estimate: the gradient of the identity from zero to half a code above the scale, zero outside.
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

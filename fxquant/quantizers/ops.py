"""Torch operators for quantization in a graph.

The operators are registered and stay one node under ``torch.export`` and ``torch.compile``, so that
a backend translates them one by one. They round half to even and divide by the scale exactly (no
multiplication by a reciprocal), as ONNX QuantizeLinear defines.
"""

from __future__ import annotations

import torch
from torch import Tensor


def broadcast(parameter: Tensor, ndim: int, axis: int | None) -> Tensor:
    """Shapes a per-axis parameter ``(C,)`` so that it broadcasts against ``ndim`` dimensions.

    Args:
        parameter: shape ``()`` for per-tensor, ``(C,)`` for per-axis.
        ndim: dimensions of the tensor to be quantized.
        axis: the axis that the parameter runs along; None for per-tensor.
    """
    if axis is None:
        return parameter
    shape = [1] * ndim
    shape[axis] = -1
    return parameter.view(shape)


@torch.library.custom_op("fxquant::quantize", mutates_args=())
def quantize(
    x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int, axis: int | None
) -> Tensor:
    """Codes of ``x``: ``clamp(round(x / scale) + zero_point, qmin, qmax)``.

    Args:
        x: float tensor of any shape.
        scale: ``()`` or ``(C,)``, positive.
        zero_point: whole numbers, in the shape of scale.
        qmin: smallest code.
        qmax: largest code.
        axis: axis of ``x`` that scale runs along, None for per-tensor.

    Returns:
        Codes as whole numbers in the dtype of ``x``; backends choose the storage type.
    """
    codes = x / broadcast(scale, x.ndim, axis)
    return codes.round_().add_(broadcast(zero_point, x.ndim, axis)).clamp_(qmin, qmax)


@torch.library.custom_op("fxquant::dequantize", mutates_args=())
def dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None) -> Tensor:
    """Values of codes, ``(codes - zero_point) * scale``; shapes are those of :func:`quantize`."""
    values = codes - broadcast(zero_point, codes.ndim, axis)
    return values.mul_(broadcast(scale, codes.ndim, axis))


@torch.library.custom_op("fxquant::fake_quantize", mutates_args=())
def fake_quantize(
    x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int, axis: int | None
) -> Tensor:
    """Rounds to the grid: ``dequantize(quantize(x))`` in one operator.

    The arguments are those of :func:`quantize`. Only ``x`` has a gradient, the straight-through
    estimate: the gradient of the identity inside the clipping range, zero outside (arXiv
    1308.3432).
    """
    step, zero = broadcast(scale, x.ndim, axis), broadcast(zero_point, x.ndim, axis)
    codes = (x / step).round_().add_(zero).clamp_(qmin, qmax)
    return codes.sub_(zero).mul_(step)


@quantize.register_fake
def _(
    x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int, axis: int | None
) -> Tensor:
    return torch.empty_like(x)


@dequantize.register_fake
def _(codes: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None) -> Tensor:
    return torch.empty_like(codes)


@fake_quantize.register_fake
def _(
    x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int, axis: int | None
) -> Tensor:
    return torch.empty_like(x)


def _save_range(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, scale, zero_point, qmin, qmax, axis = inputs
    codes = x / broadcast(scale, x.ndim, axis) + broadcast(zero_point, x.ndim, axis)
    ctx.save_for_backward((codes >= qmin - 0.5) & (codes <= qmax + 0.5))


def _straight_through(ctx, grad):  # type: ignore[no-untyped-def]
    (inside,) = ctx.saved_tensors
    return grad * inside, None, None, None, None, None


fake_quantize.register_autograd(_straight_through, setup_context=_save_range)


def twin_threshold(shift: int, bits: int) -> float:
    """Threshold between the regions of a one-sided twin quantizer, in fine steps.

    The threshold lies half-way between the last fine value and the first coarse value beyond it. In
    float32 a value above the threshold is never rounded below that coarse value, since the
    threshold is clear of the tie.

    Args:
        shift: m, at least 1.
        bits: bit-width of the codes.
    """
    levels = 1 << (bits - 1)
    first_coarse = max(levels, 1 << shift)
    return (levels - 1 + first_coarse) / 2


def _twin(
    x: Tensor, scale: Tensor, shift: int, bits: int, two_sided: bool
) -> tuple[Tensor, Tensor, Tensor | float]:
    """Signed magnitudes on the fine and the coarse grid, and the threshold between both."""
    levels, coarse = 1 << (bits - 1), scale * 2**shift
    high = (x / coarse).round_().clamp_(0, levels - 1)
    if two_sided:
        return (x / scale).round_().clamp_(1 - levels, 0), high, 0.0
    low = (x / scale).round_().clamp_(0, levels - 1)
    return low, high, scale * twin_threshold(shift, bits)


def twin_words(x: Tensor, scale: Tensor, shift: int, bits: int, two_sided: bool) -> Tensor:
    """Code words by :func:`twin_quantize` in plain operators, which ``torch.compile`` can fuse."""
    low, high, edge = _twin(x, scale, shift, bits, two_sided)
    region = x > edge
    words = torch.where(region & (high > 0), high + (1 << (bits - 1)), 0.0)
    return torch.where(region, words, low.abs_())


@torch.library.custom_op("fxquant::twin_quantize", mutates_args=())
def twin_quantize(x: Tensor, scale: Tensor, shift: int, bits: int, two_sided: bool) -> Tensor:
    """Code words of the twin uniform quantizer (``quantizers.TwinUniformQuantizer``).

    Args:
        x: float tensor of any shape.
        scale: ``D_R1``, ``()``, positive.
        shift: m in ``D_R2 = 2^m D_R1``.
        bits: bit-width of a code word, its region bit included.
        two_sided: whether the fine region holds the negative values; otherwise it holds the
            smaller values.

    Returns:
        ``region * 2^(bits-1) + magnitude`` as whole numbers in the dtype of ``x``.
    """
    return twin_words(x, scale, shift, bits, two_sided)


def twin_values(codes: Tensor, scale: Tensor, shift: int, bits: int, two_sided: bool) -> Tensor:
    """Values by :func:`twin_dequantize` in plain operators, which ``torch.compile`` can fuse."""
    levels = 1 << (bits - 1)
    fine = -scale if two_sided else scale
    return torch.where(codes >= levels, (codes - levels) * (scale * 2**shift), codes * fine)


@torch.library.custom_op("fxquant::twin_dequantize", mutates_args=())
def twin_dequantize(codes: Tensor, scale: Tensor, shift: int, bits: int, two_sided: bool) -> Tensor:
    """Values of code words; the other arguments are those of :func:`twin_quantize`."""
    return twin_values(codes, scale, shift, bits, two_sided)


@torch.library.custom_op("fxquant::twin_fake_quantize", mutates_args=())
def twin_fake_quantize(x: Tensor, scale: Tensor, shift: int, bits: int, two_sided: bool) -> Tensor:
    """Rounds to the grid: ``twin_dequantize(twin_quantize(x))`` in one operator.

    The arguments are those of :func:`twin_quantize`. The gradient is the straight-through estimate,
    as in :func:`fake_quantize`.
    """
    low, high, edge = _twin(x, scale, shift, bits, two_sided)
    low, high = low.mul_(scale), high.mul_(scale * 2**shift)
    if two_sided:  # either the fine or the coarse value is zero
        return low.add_(high)
    # The mask holds 0 and 1 in the type of the values: a choice by a boolean mask is far slower.
    return torch.lerp(low, high, x.clone().gt_(edge))


@twin_quantize.register_fake
def _(x: Tensor, scale: Tensor, shift: int, bits: int, two_sided: bool) -> Tensor:
    return torch.empty_like(x)


@twin_dequantize.register_fake
def _(codes: Tensor, scale: Tensor, shift: int, bits: int, two_sided: bool) -> Tensor:
    return torch.empty_like(codes)


@twin_fake_quantize.register_fake
def _(x: Tensor, scale: Tensor, shift: int, bits: int, two_sided: bool) -> Tensor:
    return torch.empty_like(x)


def _save_twin_range(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, scale, shift, bits, two_sided = inputs
    reach = (1 << (bits - 1)) - 0.5
    low = -reach if two_sided else -0.5
    steps = x / scale
    ctx.save_for_backward((steps >= low) & (steps <= reach * 2**shift))


def _straight_through_twin(ctx, grad):  # type: ignore[no-untyped-def]
    (inside,) = ctx.saved_tensors
    return grad * inside, None, None, None, None


twin_fake_quantize.register_autograd(_straight_through_twin, setup_context=_save_twin_range)

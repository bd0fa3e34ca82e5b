"""The torch operators that stand for quantization in a graph.

Being registered operators, they stay one node under ``torch.export`` and ``torch.compile``, so a
backend translates them one by one. Rounding is half to even and the quotient a true division, as
ONNX QuantizeLinear defines them.
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
        zero_point: like scale, whole numbers.
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
    """Values of codes: ``(codes - zero_point) * scale``; shapes as in :func:`quantize`."""
    values = codes - broadcast(zero_point, codes.ndim, axis)
    return values.mul_(broadcast(scale, codes.ndim, axis))


@torch.library.custom_op("fxquant::fake_quantize", mutates_args=())
def fake_quantize(
    x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int, axis: int | None
) -> Tensor:
    """``dequantize(quantize(x))`` in one operator; arguments as in :func:`quantize`.

    The gradient is the straight-through estimate: that of the identity inside the clipping range,
    zero outside (arXiv 1308.3432), for ``x`` alone.
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

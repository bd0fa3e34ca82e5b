"""ONNX's QuantizeLinear and DequantizeLinear as torch operators, and their translations.

PyTorch's exporter exports a graph with these operators and writes everything else itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from onnxscript import opset21
from torch import Tensor

from fxquant.quantizers.ops import broadcast


@torch.library.custom_op("fxquant_onnx::quantize_linear", mutates_args=())
def quantize_linear(x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """Codes ``saturate(round(x / scale) + zero_point)`` in the integer type of ``zero_point``.

    Args:
        x: float tensor.
        scale: shape ``()``.
        zero_point: shape ``()``, in the storage type.
    """
    limits = torch.iinfo(zero_point.dtype)
    codes = torch.round(x / scale) + zero_point.to(x.dtype)
    return codes.clamp_(limits.min, limits.max).to(zero_point.dtype)


@torch.library.custom_op("fxquant_onnx::dequantize_linear", mutates_args=())
def dequantize_linear(codes: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None) -> Tensor:
    """Values ``(codes - zero_point) * scale``, float32.

    Args:
        codes: integer tensor.
        scale: ``()`` or ``(C,)``.
        zero_point: shaped as scale, in the type of the codes.
        axis: axis of the codes that scale runs along.
    """
    shifted = codes.to(torch.float32) - broadcast(zero_point.float(), codes.ndim, axis)
    return shifted * broadcast(scale, codes.ndim, axis)


@quantize_linear.register_fake
def _(x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    return torch.empty_like(x, dtype=zero_point.dtype)


@dequantize_linear.register_fake
def _(codes: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None) -> Tensor:
    return torch.empty_like(codes, dtype=torch.float32)


def _to_quantize(x: Any, scale: Any, zero_point: Any) -> Any:
    return opset21.QuantizeLinear(x, scale, zero_point)


def _to_dequantize(codes: Any, scale: Any, zero_point: Any, axis: int | None = None) -> Any:
    if axis is None:
        return opset21.DequantizeLinear(codes, scale, zero_point)
    return opset21.DequantizeLinear(codes, scale, zero_point, axis=axis)


# The operators as targets of a graph's nodes.
QUANTIZE = torch.ops.fxquant_onnx.quantize_linear.default
DEQUANTIZE = torch.ops.fxquant_onnx.dequantize_linear.default
TRANSLATIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    QUANTIZE: _to_quantize,
    DEQUANTIZE: _to_dequantize,
}

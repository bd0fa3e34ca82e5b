"""Lowering of the products of a FROZEN graph to modules on integer codes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from fxquant.backends.base import lowering_of
from fxquant.backends.integer.convolve import Geometry
from fxquant.backends.integer.lowerings import LOWERINGS
from fxquant.backends.integer.modules import (
    AnyOperand,
    IntConv,
    IntLinear,
    IntMatmul,
    QuantizedOperand,
    bias_codes,
)
from fxquant.config.vocabulary import OpKind
from fxquant.errors import LoweringError
from fxquant.graph.edges import Edge
from fxquant.graph.nodes import arguments, constant, submodule
from fxquant.quantizers import AffineQuantizer, Quantizer

Product = IntLinear | IntConv | IntMatmul


def make_product(
    gm: fx.GraphModule, left: Edge, right: Edge
) -> tuple[Product, tuple[fx.Node, ...]]:
    """Makes the module of a product with two quantized operands.

    Args:
        gm: the graph.
        left: edge of the product's input or left operand.
        right: edge of the product's weight or right operand.

    Returns:
        The module, and its arguments behind the codes of both operands: the float bias where the
        bias is not a whole number of accumulator units.

    Raises:
        LoweringError: a quantizer has codes that this backend does not multiply, or a scale along
            the summed axis.
    """
    if left.kind is OpKind.MATMUL:
        return IntMatmul(
            _activation_operand(gm, left, summed=-1), _activation_operand(gm, right, summed=-2)
        ), ()
    return _linear(gm, left, right) if left.kind is OpKind.LINEAR else _conv(gm, left, right)


def _linear(gm: fx.GraphModule, x: Edge, weight: Edge) -> tuple[IntLinear, tuple[fx.Node, ...]]:
    quantizer = _weight_quantizer(gm, weight)
    # The product multiplies with the transposed weight, whose output channels are on the last axis.
    operands = (
        _activation_operand(gm, x, summed=-1),
        QuantizedOperand(quantizer, None if quantizer.axis is None else -1),
    )
    bias, float_bias = _split_bias(gm, weight, operands, arguments(x.node)["bias"])
    return IntLinear(*operands, bias), float_bias


def _conv(gm: fx.GraphModule, x: Edge, weight: Edge) -> tuple[IntConv, tuple[fx.Node, ...]]:
    quantizer, input_quantizer = _weight_quantizer(gm, weight), submodule(gm, x.source)
    assert isinstance(input_quantizer, Quantizer)
    if input_quantizer.scale_axis is not None:
        reason = "a convolution needs one scale for its input"
        raise _axis_error(x, input_quantizer.scale_axis, reason)
    operands = _activation_operand(gm, x, summed=1), QuantizedOperand(quantizer, quantizer.axis)
    bias, float_bias = _split_bias(gm, weight, operands, arguments(x.node)["bias"])
    kernel = tuple(_constant_shape(gm, weight)[2:])
    return IntConv(*operands, bias, _geometry(arguments(x.node), kernel)), float_bias


def _activation_operand(gm: fx.GraphModule, edge: Edge, *, summed: int) -> AnyOperand:
    """Operand of a product that sums over axis ``summed`` of an activation.

    Raises:
        LoweringError: the scale runs along the summed axis, or may run along it.
    """
    quantizer = submodule(gm, edge.source)
    assert isinstance(quantizer, Quantizer)
    axis = quantizer.scale_axis
    if axis == summed:
        raise _axis_error(edge, axis, "the sum runs over it, so that no scale factors out")
    if axis is not None and axis >= 0:
        raise _axis_error(edge, axis, "axes of activations are counted from the last")
    return lowering_of(LOWERINGS, quantizer, edge, "the integer backend").operand(quantizer, axis)


def _weight_quantizer(gm: fx.GraphModule, edge: Edge) -> AffineQuantizer:
    quantizer = submodule(gm, edge.source)
    assert isinstance(quantizer, AffineQuantizer)  # AssignSpecs assigns no other scheme to weights
    if quantizer.axis not in (None, 0):
        raise _axis_error(edge, quantizer.axis, "a weight has one scale or one a row (axis 0)")
    return quantizer


def _axis_error(edge: Edge, axis: int | None, reason: str) -> LoweringError:
    return LoweringError(
        f"{edge.name} ({edge.path}): the integer backend cannot have a scale for each entry of "
        f"axis {axis} here: {reason}. Quantize this edge per tensor or keep it float",
        edge=edge.name,
        got=axis,
    )


def _constant_shape(gm: fx.GraphModule, edge: Edge) -> torch.Size:
    """Shape of the constant behind a weight's quantizer."""
    value = constant(gm, edge.source.all_input_nodes[0])
    if value is None:
        raise LoweringError(
            f"{edge.name} ({edge.path}): the integer backend needs constant weights, got one "
            "computed at run time; keep this edge float (spec: null)",
            edge=edge.name,
            expected="a constant weight",
        )
    return value.shape


def _split_bias(
    gm: fx.GraphModule,
    weight: Edge,
    operands: tuple[AnyOperand, QuantizedOperand],
    bias: fx.Node | None,
) -> tuple[Tensor | None, tuple[fx.Node, ...]]:
    """Bias as integer codes, or as float arguments where it has no integer codes."""
    depth = _constant_shape(gm, weight)[1:].numel()
    bias_value = constant(gm, bias)
    if bias is None:
        return None, ()
    input_operand, weight_operand = operands
    if bias_value is None or input_operand.scale.ndim:
        return None, (bias,)
    codes = bias_codes(
        bias_value,
        input_operand.scale * weight_operand.scale,
        depth * input_operand.bound * weight_operand.bound,
    )
    return (None, (bias,)) if codes is None else (codes, ())


def _geometry(arguments: dict[str, Any], kernel: tuple[int, ...]) -> Geometry:
    stride = _per_axis(arguments["stride"], len(kernel))
    dilation = _per_axis(arguments["dilation"], len(kernel))
    padding = arguments["padding"]
    if padding == "same":
        spans = [d * (taps - 1) for d, taps in zip(dilation, kernel, strict=True)]
        pairs = tuple((span // 2, span - span // 2) for span in spans)
    else:
        amounts = _per_axis(0 if padding == "valid" else padding, len(kernel))
        pairs = tuple((amount, amount) for amount in amounts)
    groups = arguments["groups"]
    return Geometry(stride=stride, padding=pairs, dilation=dilation, groups=groups)


def _per_axis(value: int | list[int], count: int) -> tuple[int, ...]:
    values = [value] if isinstance(value, int) else list(value)
    return tuple(values * count if len(values) == 1 else values)

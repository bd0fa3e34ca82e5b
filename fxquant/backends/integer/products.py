"""Products of a FROZEN graph as modules on integer codes."""

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
    """The module of a product both of whose operands are quantized.

    Args:
        gm: the graph.
        left: edge of its input or left operand.
        right: edge of its weight or right operand.

    Returns:
        The module, and what it takes behind the codes of both operands: the bias where that is no
        whole number of accumulator units.

    Raises:
        LoweringError: a quantizer has codes that this backend does not multiply, or a scale along
            the summed axis.
    """
    if left.kind is OpKind.MATMUL:
        return IntMatmul(_side(gm, left, summed=-1), _side(gm, right, summed=-2)), ()
    return _linear(gm, left, right) if left.kind is OpKind.LINEAR else _conv(gm, left, right)


def _linear(gm: fx.GraphModule, x: Edge, weight: Edge) -> tuple[IntLinear, tuple[fx.Node, ...]]:
    quantizer = _weight_quantizer(gm, weight)
    # The product takes the transposed weight, whose output channels lie on the last axis.
    sides = (
        _side(gm, x, summed=-1),
        QuantizedOperand(quantizer, None if quantizer.axis is None else -1),
    )
    bias, rest = _split_bias(gm, weight, sides, arguments(x.node)["bias"])
    return IntLinear(*sides, bias), rest


def _conv(gm: fx.GraphModule, x: Edge, weight: Edge) -> tuple[IntConv, tuple[fx.Node, ...]]:
    quantizer, input_quantizer = _weight_quantizer(gm, weight), submodule(gm, x.source)
    assert isinstance(input_quantizer, Quantizer)
    if input_quantizer.scale_axis is not None:
        reason = "a convolution takes one scale for its input"
        raise _axis_error(x, input_quantizer.scale_axis, reason)
    sides = _side(gm, x, summed=1), QuantizedOperand(quantizer, quantizer.axis)
    bias, rest = _split_bias(gm, weight, sides, arguments(x.node)["bias"])
    kernel = tuple(_constant_shape(gm, weight)[2:])
    return IntConv(*sides, bias, _geometry(arguments(x.node), kernel)), rest


def _side(gm: fx.GraphModule, edge: Edge, *, summed: int) -> AnyOperand:
    """An activation as operand of a product over its axis ``summed``.

    Raises:
        LoweringError: the scale runs along that axis, or may do so.
    """
    quantizer = submodule(gm, edge.source)
    assert isinstance(quantizer, Quantizer)
    axis = quantizer.scale_axis
    if axis == summed:
        raise _axis_error(edge, axis, "the sum runs over it, so no scale factors out")
    if axis is not None and axis >= 0:
        raise _axis_error(edge, axis, "axes of activations are counted from the last")
    return lowering_of(LOWERINGS, quantizer, edge, "the integer backend").operand(quantizer, axis)


def _weight_quantizer(gm: fx.GraphModule, edge: Edge) -> AffineQuantizer:
    quantizer = submodule(gm, edge.source)
    assert isinstance(quantizer, AffineQuantizer)  # AssignSpecs gives weights no other
    if quantizer.axis not in (None, 0):
        raise _axis_error(edge, quantizer.axis, "a weight has one scale or one a row (axis 0)")
    return quantizer


def _axis_error(edge: Edge, axis: int | None, reason: str) -> LoweringError:
    return LoweringError(
        f"{edge.name} ({edge.path}): the integer backend cannot have a scale for each entry of "
        f"axis {axis} here: {reason}. Quantize this edge per tensor or keep it float"
    )


def _constant_shape(gm: fx.GraphModule, edge: Edge) -> torch.Size:
    """Shape of the constant behind a weight's quantizer."""
    value = constant(gm, edge.source.all_input_nodes[0])
    if value is None:
        raise LoweringError(
            f"{edge.name} ({edge.path}): the integer backend takes constant weights, got one "
            "computed at run time; keep this edge float (spec: null)",
            edge=edge.name,
        )
    return value.shape


def _split_bias(
    gm: fx.GraphModule,
    weight: Edge,
    sides: tuple[AnyOperand, QuantizedOperand],
    bias: fx.Node | None,
) -> tuple[Tensor | None, tuple[fx.Node, ...]]:
    """The bias as integer codes, or else as the float argument that it is."""
    depth = _constant_shape(gm, weight)[1:].numel()
    value = constant(gm, bias)
    if bias is None:
        return None, ()
    x, w = sides
    if value is None or x.scale.ndim:
        return None, (bias,)
    codes = bias_codes(value, x.scale * w.scale, depth * x.bound * w.bound)
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

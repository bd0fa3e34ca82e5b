"""Which module stands for an operation between products, and what its numbers mean."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from fxquant.backends.integer.elementwise import FUNCTION_BITS, IntAdd, IntMean, Lookup, table_of
from fxquant.backends.integer.lowered_values import Accumulator, CodeFunction
from fxquant.backends.integer.norm import IntNorm
from fxquant.backends.integer.softmax import IntSoftmax
from fxquant.config.vocabulary import OpKind
from fxquant.errors import LoweringError
from fxquant.graph.dialect import aten, elementwise_kind
from fxquant.graph.nodes import arguments, constant, operand
from fxquant.quantizers import AffineQuantizer

_POOLS = (aten.adaptive_avg_pool1d.default, aten.adaptive_avg_pool2d.default)
MEANS = (aten.mean.dim, *_POOLS)


def elementwise_module(
    gm: fx.GraphModule, node: fx.Node, quantizers: list[AffineQuantizer]
) -> IntAdd | IntSoftmax | IntNorm:
    """The module from the codes of an addition, softmax or norm to its sums.

    Args:
        gm: the old graph.
        node: the operation in it.
        quantizers: of its inputs, per tensor.

    Raises:
        LoweringError: it has no integer form.
    """
    kind, given = elementwise_kind(node), arguments(node)
    if kind is OpKind.ADD:
        if len(quantizers) < 2 or given["alpha"] != 1:
            raise LoweringError(f"{node.name} does not add two tensors as they are")
        return IntAdd(*quantizers)
    if kind is OpKind.SOFTMAX:
        return IntSoftmax(quantizers[0], given["dim"])
    weight, bias = (constant(gm, given.get(name)) for name in ("weight", "bias"))
    if (weight is None) != (given["weight"] is None):
        raise LoweringError(f"{node.name} has a weight that is computed at run time")
    eps = torch.finfo(torch.float32).eps if given["eps"] is None else given["eps"]
    shape, centred = tuple(given["normalized_shape"]), kind is OpKind.LAYER_NORM
    return IntNorm(quantizers[0], shape, weight, bias, eps=eps, centred=centred)


def function_of(node: fx.Node) -> Callable[[Tensor], Tensor]:
    """What an activation function computes of its input."""
    target: Any = node.target
    return lambda values: target(values, *node.args[1:], **node.kwargs)


def curve_module(curve: CodeFunction) -> tuple[Lookup, Tensor, int]:
    """A table from codes to whole numbers, with their unit and bound, where no quantizer reads."""
    values = table_of(curve.quantizer, curve.function).double()
    table = torch.round(torch.ldexp(values, torch.tensor(FUNCTION_BITS))).to(torch.int64)
    unit = torch.tensor(2.0**-FUNCTION_BITS, dtype=torch.float64)
    return Lookup(table, curve.quantizer.qmin), unit, int(table.abs().max())


def mean_module(node: fx.Node, inner: Accumulator) -> tuple[IntMean, int]:
    """The module of a mean, and how many values it sums.

    Args:
        node: the mean in the old graph.
        inner: what it reads.

    Raises:
        LoweringError: their number is not known, or they have several units.
    """
    given, shape = arguments(node), operand(node, 0).meta["val"].shape
    axes: list[int] = given.get("dim") or []
    keepdim = given.get("keepdim", True)
    if node.target in _POOLS:
        size = list(given["output_size"])
        axes = list(range(-len(size), 0)) if set(size) == {1} else []
    sizes = [shape[axis] for axis in axes]
    if not sizes or not all(isinstance(n, int) for n in sizes) or inner.axis is not None:
        raise LoweringError(
            f"{node.name} takes a mean that is not over whole axes of fixed size, or of values "
            "with a scale for each channel"
        )
    return IntMean(tuple(axes), keepdim=keepdim), torch.Size(sizes).numel()

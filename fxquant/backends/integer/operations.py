"""Integer modules of the operations between products, and the units of their outputs."""

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
    """Makes the module that maps the input codes of an addition, softmax or norm to its sums.

    Args:
        gm: the float graph.
        node: the operation in the float graph.
        quantizers: quantizers of the operation's inputs, per tensor.

    Raises:
        LoweringError: the operation has no integer form.
    """
    kind, options = elementwise_kind(node), arguments(node)
    if kind is OpKind.ADD:
        if len(quantizers) < 2 or options["alpha"] != 1:
            raise LoweringError(f"{node.name} does not add two tensors as they are", edge=node.name)
        return IntAdd(*quantizers)
    if kind is OpKind.SOFTMAX:
        return IntSoftmax(quantizers[0], options["dim"])
    weight, bias = (constant(gm, options.get(name)) for name in ("weight", "bias"))
    if (weight is None) != (options["weight"] is None):
        raise LoweringError(
            f"{node.name} has a weight that is computed at run time", edge=node.name
        )
    eps = torch.finfo(torch.float32).eps if options["eps"] is None else options["eps"]
    shape, centred = tuple(options["normalized_shape"]), kind is OpKind.LAYER_NORM
    return IntNorm(quantizers[0], shape, weight, bias, eps=eps, centred=centred)


def function_of(node: fx.Node) -> Callable[[Tensor], Tensor]:
    """The activation function of a node, as a function of its first input."""
    target: Any = node.target
    return lambda values: target(values, *node.args[1:], **node.kwargs)


def function_module(function: CodeFunction) -> tuple[Lookup, Tensor, int]:
    """Table from codes to whole numbers, for a function that no quantizer reads; unit and bound."""
    values = table_of(function.quantizer, function.function).double()
    table = torch.round(torch.ldexp(values, torch.tensor(FUNCTION_BITS))).to(torch.int64)
    unit = torch.tensor(2.0**-FUNCTION_BITS, dtype=torch.float64)
    return Lookup(table, function.quantizer.qmin), unit, int(table.abs().max())


def mean_module(node: fx.Node, sums: Accumulator) -> tuple[IntMean, int]:
    """Makes the module of a mean and counts the values that each sum adds.

    Args:
        node: the mean in the float graph.
        sums: accumulators that the mean reads.

    Raises:
        LoweringError: the number of values is not known, or the accumulators have several units.
    """
    options, shape = arguments(node), operand(node, 0).meta["val"].shape
    axes: list[int] = options.get("dim") or []
    keepdim = options.get("keepdim", True)
    if node.target in _POOLS:
        size = list(options["output_size"])
        axes = list(range(-len(size), 0)) if set(size) == {1} else []
    sizes = [shape[axis] for axis in axes]
    if not sizes or not all(isinstance(n, int) for n in sizes) or sums.axis is not None:
        raise LoweringError(
            f"{node.name} is a mean that is not over whole axes of fixed size, or of values "
            "with a scale for each channel",
            edge=node.name,
        )
    return IntMean(tuple(axes), keepdim=keepdim), torch.Size(sizes).numel()

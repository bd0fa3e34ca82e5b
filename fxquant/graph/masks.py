"""Finds values that may be minus infinity, as in attention masks, which no integer code means."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, fx

from fxquant.config.vocabulary import OpKind
from fxquant.graph.dialect import aten, elementwise_kind, op_kind
from fxquant.graph.nodes import constant

# Operations whose results are finite all the same. A pool pads with minus infinity, which is never
# the largest value of a window.
_MAKE_FINITE = {
    aten.clamp.default,
    aten.clamp_min.default,
    aten.exp.default,
    aten.max_pool1d.default,
    aten.max_pool2d.default,
    aten.nan_to_num.default,
    aten.relu.default,
    aten.sigmoid.default,
    aten.tanh.default,
}


def masked(gm: fx.GraphModule) -> set[fx.Node]:
    """Nodes whose values may be minus infinity.

    These are constants that hold it, operations with it as an argument, and nodes that read one of
    these; products, softmax and operations such as ``clamp`` yield finite values again.
    """
    infinite: set[fx.Node] = set()
    for node in gm.graph.nodes:
        value = constant(gm, node)
        if value is not None:
            may_be = value.is_floating_point() and bool(value.isneginf().any())
        else:
            may_be = _keeps_infinity(node) and (
                any(map(_is_minus_infinity, (*node.args, *node.kwargs.values())))
                or any(source in infinite for source in node.all_input_nodes)
            )
        if may_be:
            infinite.add(node)
    return infinite


def _keeps_infinity(node: fx.Node) -> bool:
    """Whether an operation yields minus infinity where it reads minus infinity."""
    value = node.meta.get("val")
    if node.op != "call_function" or (isinstance(value, Tensor) and not value.is_floating_point()):
        return False
    finite = node.target in _MAKE_FINITE or elementwise_kind(node) is OpKind.SOFTMAX
    return not finite and op_kind(node) is None


def _is_minus_infinity(argument: Any) -> bool:
    return isinstance(argument, float) and argument == -math.inf

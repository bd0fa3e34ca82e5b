"""Where minus infinity may stand, which attention masks hide scores with and no code stands for."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, fx

from fxquant.config.vocabulary import OpKind
from fxquant.graph.dialect import aten, elementwise_kind, op_kind
from fxquant.graph.nodes import constant

# Of minus infinity they make something else; what a pool pads with is never the largest.
_ENDS = {
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
    """Nodes whose values may be minus infinity: constants that are, and what is made with them.

    A product or softmax ends the way.
    """
    found: set[fx.Node] = set()
    for node in gm.graph.nodes:
        value = constant(gm, node)
        if value is not None:
            hides = value.is_floating_point() and bool(value.isneginf().any())
        else:
            hides = _passes(node) and (
                any(_is_hidden(given) for given in (*node.args, *node.kwargs.values()))
                or any(source in found for source in node.all_input_nodes)
            )
        if hides:
            found.add(node)
    return found


def _passes(node: fx.Node) -> bool:
    value = node.meta.get("val")
    if node.op != "call_function" or (isinstance(value, Tensor) and not value.is_floating_point()):
        return False
    ends = node.target in _ENDS or elementwise_kind(node) is OpKind.SOFTMAX
    return not ends and op_kind(node) is None


def _is_hidden(given: Any) -> bool:
    return isinstance(given, float) and given == -math.inf

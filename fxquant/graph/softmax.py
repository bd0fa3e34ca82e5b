"""Softmax in its two forms: one operation, or exponentials divided after a product.

``passes.DeferSoftmax`` makes the second form of attention.
"""

from __future__ import annotations

from torch import fx

from fxquant.graph.dialect import aten
from fxquant.graph.nodes import rank

SOFTMAX_OPS = (aten.softmax.int, aten._softmax.default)


def is_along_rows(softmax: fx.Node) -> bool:
    """Whether a softmax in one operation runs along the last axis."""
    return softmax.args[1] in (-1, rank(softmax) - 1)


def is_softmax(node: fx.Node) -> bool:
    """Whether a node is a softmax, or the exponentials of a deferred one."""
    return node.target in SOFTMAX_OPS or is_deferred_softmax(node)


def is_deferred_softmax(node: fx.Node) -> bool:
    """Whether a node is ``exp(x - amax(x))`` along the last axis: softmax, not divided yet."""
    if node.target is not aten.exp.default:
        return False
    difference = node.args[0]
    if not isinstance(difference, fx.Node) or difference.target is not aten.sub.Tensor:
        return False
    scores, largest = difference.args[:2]
    return (
        isinstance(largest, fx.Node)
        and largest.target is aten.amax.default
        and largest.args == (scores, [-1], True)
    )


def is_deferred_division(node: fx.Node, product: fx.Node) -> bool:
    """Whether a node divides a product by the row sums of the product's left operand."""
    if node.target is not aten.div.Tensor or node.args[0] is not product:
        return False
    total = node.args[1]
    return (
        isinstance(total, fx.Node)
        and total.target is aten.sum.dim_IntList
        and total.args == (product.args[0], [-1], True)
    )

"""Rewrites every matrix product as ``linear`` or ``matmul``.

Before: ``addmm(b, x, W)``, ``mm(x, W)``, ``bmm(x, W)``, ``matmul(x, W)`` with a constant ``W``
        of shape ``(K, N)`` or ``(1, …, K, N)``
After:  ``linear(x, W^T, b)``

Before: ``bmm(a, b)``, ``mm(a, b)``, ``baddbmm(c, a, b)``
After:  ``matmul(a, b)``, ``c + matmul(a, b)``
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, fx

from fxquant.config.vocabulary import Stage
from fxquant.graph.dialect import aten
from fxquant.graph.nodes import constant, rank
from fxquant.graph.rewrite import add_constant, emit
from fxquant.passes.base import PassResult

# Operator -> positions of (addend, lhs, rhs).
_PRODUCTS: dict[Any, tuple[int | None, int, int]] = {
    aten.matmul.default: (None, 0, 1),
    aten.mm.default: (None, 0, 1),
    aten.bmm.default: (None, 0, 1),
    aten.addmm.default: (0, 1, 2),
    aten.baddbmm.default: (0, 1, 2),
}


def _weight(gm: fx.GraphModule, rhs: Any) -> Tensor | None:
    """``W^T`` of shape ``(N, K)`` where ``rhs`` is a single constant matrix, else None."""
    value = constant(gm, rhs)
    if value is None or value.ndim < 2 or value.numel() != value.shape[-2] * value.shape[-1]:
        return None
    return value.reshape(value.shape[-2:]).t()


def _rewrite(gm: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    """Emits the node that replaces ``node``; None where ``node`` stays."""

    def call(target: Callable[..., Any], *args: Any) -> fx.Node:
        return emit(gm, target, *args, like=node)

    addend_index, lhs_index, rhs_index = _PRODUCTS[node.target]
    lhs, rhs = node.args[lhs_index], node.args[rhs_index]
    addend = None if addend_index is None else node.args[addend_index]
    plain = not node.kwargs  # beta and alpha are keyword-only
    weight = _weight(gm, rhs)
    assert isinstance(lhs, fx.Node) and isinstance(rhs, fx.Node)
    # The leading axes of a weight with more axes than the tokens would be axes of the result.
    if weight is not None and rank(lhs) >= rank(rhs):
        new_weight = add_constant(gm, weight, f"{node.name}_weight", like=node)
        bias = constant(gm, addend)
        if plain and bias is not None and bias.shape == (weight.shape[0],):
            return call(aten.linear.default, lhs, new_weight, addend)
        product = call(aten.linear.default, lhs, new_weight)
    elif node.target is aten.matmul.default:
        return None
    else:
        product = call(aten.matmul.default, lhs, rhs)
    if addend is None:
        return product
    alpha, beta = node.kwargs.get("alpha", 1), node.kwargs.get("beta", 1)
    if alpha != 1:
        product = call(aten.mul.Tensor, product, alpha)
    if beta == 0:
        return product
    if beta != 1:
        addend = call(aten.mul.Tensor, addend, beta)
    return call(aten.add.Tensor, product, addend)


@dataclass(frozen=True)
class ToLinear:
    """Rewrites matrix products as linears and matmuls."""

    requires: ClassVar[Stage] = Stage.FLOAT
    ensures: ClassVar[Stage] = Stage.FLOAT

    def run(self, gm: fx.GraphModule) -> PassResult:
        """Rewrites all products; a matmul of two activations stays unchanged."""
        changed = 0
        for node in list(gm.graph.nodes):
            if node.op != "call_function" or node.target not in _PRODUCTS:
                continue
            with gm.graph.inserting_before(node):
                new = _rewrite(gm, node)
            if new is None:
                continue  # a product of two activations is in the dialect already
            node.replace_all_uses_with(new)
            gm.graph.erase_node(node)
            changed += 1
        gm.graph.eliminate_dead_code()
        return PassResult(changed)

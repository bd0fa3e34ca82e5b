"""Moves the division of each softmax behind the product that reads the softmax.

Before: ``y = softmax(s) @ v``
After:  ``e = exp(s - amax(s))``, ``y = (e @ v) / sum(e)``

Both sums run along the rows. The quantizer of the left operand now reads exponentials, whose
largest value is 1 in every row. Its grid fits each row, as if each had a scale of its own, whereas
one grid for softmax outputs must reach from a token that all attention goes to, down to the
``1 / N`` of even attention over ``N`` tokens: with 8 bits and 257 tokens, that is one step. The
scale is constant and the product an integer product as before (SageAttention, arXiv 2410.02367,
section 3.3, quantizes the same exponentials). The division acts on the product's few columns
instead of ``N``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from fxquant.config.vocabulary import Stage
from fxquant.graph.dialect import aten
from fxquant.graph.nodes import moved_readers
from fxquant.graph.rewrite import emit
from fxquant.graph.softmax import SOFTMAX_OPS, is_along_rows
from fxquant.passes.base import PassResult, Refusal, skipped
from fxquant.smoothing.fold_sites import rows_sum_to_one


@dataclass(frozen=True)
class DeferSoftmax:
    """Moves the division of softmax behind the product."""

    requires: ClassVar[Stage] = Stage.FLOAT
    ensures: ClassVar[Stage] = Stage.FLOAT

    @torch.no_grad()
    def run(self, gm: fx.GraphModule) -> PassResult:
        """Rewrites every softmax whose rows are left operands of products and nothing else."""
        changed, notes = 0, []
        for node in list(gm.graph.nodes):
            if node.target not in SOFTMAX_OPS:
                continue
            products = _products_of(node)
            if isinstance(products, Refusal):
                notes.append(skipped(node.name, f"its division stays before products: {products}"))
                continue
            _defer(gm, node, products)
            changed += 1
        gm.graph.eliminate_dead_code()
        return PassResult(changed, tuple(notes))


def _products_of(softmax: fx.Node) -> list[fx.Node] | Refusal:
    """The products that read the rows of a softmax, or the reason why it keeps its division."""
    if not is_along_rows(softmax):
        return Refusal("it is not along the last axis")
    readers = moved_readers(softmax)
    for reader, node in readers:
        if reader.target is not aten.matmul.default or reader.args[0] is not node:
            return Refusal(f"{reader} reads it too, and is not a product of its rows")
        if reader.args[1] is node:
            return Refusal(f"it is both operands of {reader}")
        if not rows_sum_to_one(node):
            return Refusal(f"its rows do not reach {reader} whole")
    return [reader for reader, _ in readers] or Refusal("no product reads it")


def _defer(gm: fx.GraphModule, softmax: fx.Node, products: list[fx.Node]) -> None:
    scores = softmax.args[0]
    with gm.graph.inserting_before(softmax):
        largest = emit(gm, aten.amax.default, scores, [-1], True, like=softmax)
        difference = emit(gm, aten.sub.Tensor, scores, largest, like=softmax)
        exponentials = emit(gm, aten.exp.default, difference, like=softmax)
    softmax.replace_all_uses_with(exponentials)
    for product in products:
        with gm.graph.inserting_before(product):
            total = emit(gm, aten.sum.dim_IntList, product.args[0], [-1], True, like=softmax)
        with gm.graph.inserting_after(product):
            quotient = emit(gm, aten.div.Tensor, product, total, like=softmax)
        product.replace_all_uses_with(quotient)
        quotient.replace_input_with(quotient, product)
    gm.graph.erase_node(softmax)

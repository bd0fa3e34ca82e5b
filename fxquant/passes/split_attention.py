"""Opens fused attention, so that each of its products can be quantized.

Before: ``y = scaled_dot_product_attention(q, k, v, mask, scale=s)``
After:  ``y = softmax(q @ k^T * s + mask) @ v``

The scale stands behind the product (``(s q) @ k^T = s (q @ k^T)``), where a backend can fold it
into the product's own output scale. A boolean mask becomes 0 / -inf, a causal one a triangle;
grouped queries repeat k and v.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from fxquant.graph import aten, constant
from fxquant.passes.base import PassResult
from fxquant.rewrite import emit
from fxquant.spec import Stage

_FUSED = aten.scaled_dot_product_attention.default


def _arguments(node: fx.Node) -> dict[str, Any]:
    names = [argument.name for argument in _FUSED._schema.arguments]
    defaults = {argument.name: argument.default_value for argument in _FUSED._schema.arguments}
    return {**defaults, **dict(zip(names, node.args, strict=False)), **node.kwargs}


def _mask(
    call: Callable[..., fx.Node], mask: fx.Node | None, causal: bool, scores: fx.Node
) -> fx.Node | None:
    """The additive mask, or None."""
    if causal:
        rows = call(aten.sym_size.int, scores, -2)
        columns = call(aten.sym_size.int, scores, -1)
        device = scores.meta["val"].device
        ones = call(aten.ones.default, [rows, columns], dtype=torch.bool, device=device)
        mask = call(aten.tril.default, ones)
    if mask is None or mask.meta["val"].dtype != torch.bool:
        return mask
    hidden = call(aten.logical_not.default, mask)
    zeros = call(aten.zeros_like.default, hidden, dtype=scores.meta["val"].dtype)
    return call(aten.masked_fill.Scalar, zeros, hidden, float("-inf"))


def _split(gm: fx.GraphModule, node: fx.Node) -> fx.Node:
    def call(target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        return emit(gm, target, *args, like=node, **kwargs)

    given = _arguments(node)
    query, key, value = given["query"], given["key"], given["value"]
    if given["enable_gqa"]:
        repeat = query.meta["val"].shape[-3] // key.meta["val"].shape[-3]
        key = call(aten.repeat_interleave.self_int, key, repeat, -3)
        value = call(aten.repeat_interleave.self_int, value, repeat, -3)
    scale = given["scale"]
    if scale is None:
        scale = float(query.meta["val"].shape[-1]) ** -0.5
    scores = call(aten.matmul.default, query, call(aten.transpose.int, key, -2, -1))
    scores = call(aten.mul.Tensor, scores, scale)
    mask = _mask(call, given["attn_mask"], given["is_causal"], scores)
    if mask is not None:
        scores = call(aten.add.Tensor, scores, mask)
    probabilities = call(aten.softmax.int, scores, -1)
    given_mask = given["attn_mask"]
    if given_mask is not None and given_mask.meta["val"].dtype == torch.bool:
        probabilities = _clear_hidden_rows(gm, call, given_mask, probabilities)
    return call(aten.matmul.default, probabilities, value)


def _clear_hidden_rows(
    gm: fx.GraphModule, call: Callable[..., fx.Node], mask: fx.Node, probabilities: fx.Node
) -> fx.Node:
    """Attention of a token that sees no other is zero, where the softmax of -inf alone is NaN."""
    value = constant(gm, mask)
    if value is not None and bool(value.any(-1).all()):
        return probabilities
    blind = call(aten.logical_not.default, call(aten.any.dim, mask, -1, True))
    return call(aten.masked_fill.Scalar, probabilities, blind, 0.0)


@dataclass(frozen=True)
class SplitAttention:
    """See the module's text."""

    requires: ClassVar[Stage] = Stage.FLOAT
    ensures: ClassVar[Stage] = Stage.FLOAT

    def run(self, gm: fx.GraphModule) -> PassResult:
        """Splits every fused attention."""
        fused = [node for node in gm.graph.nodes if node.target is _FUSED]
        for node in fused:
            with gm.graph.inserting_before(node):
                node.replace_all_uses_with(_split(gm, node))
            gm.graph.erase_node(node)
        return PassResult(len(fused))

"""Splits fused attention into its products, each of which can then be quantized.

Before: ``y = scaled_dot_product_attention(q, k, v, mask, scale=s)``
After:  ``y = softmax(q @ k^T * s + mask) @ v``

The factor s multiplies the result of the product (``(s q) @ k^T = s (q @ k^T)``), where a backend
can fold it into the output scale of the product. A boolean mask becomes 0 / -inf, a causal one a
triangle; grouped queries repeat k and v. Where a mask may hide a whole row, the probabilities of
that row are set to 0.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import SymInt, fx

from fxquant.config.vocabulary import Stage
from fxquant.graph.dialect import DATA_MOVEMENT_OPS, aten
from fxquant.graph.nodes import arguments, get_parameter
from fxquant.graph.rewrite import add_constant, emit
from fxquant.graph.shapes import example_size
from fxquant.graph.sizes import is_size
from fxquant.passes.base import PassResult

_FUSED = aten.scaled_dot_product_attention.default


def _causal(gm: fx.GraphModule, call: Callable[..., fx.Node], scores: fx.Node) -> fx.Node:
    """The causal mask, ``(N, M)``: true where the key is not behind the query."""
    value = scores.meta["val"]
    sizes = value.shape[-2:]
    if not any(isinstance(size, SymInt) for size in sizes):
        triangle = torch.ones(sizes, dtype=torch.bool, device=value.device).tril()
        return add_constant(gm, triangle, "causal", like=scores)
    rows, columns = (
        call(aten.sym_size.int, scores, axis) if isinstance(sizes[axis], SymInt) else sizes[axis]
        for axis in (-2, -1)
    )
    ones = call(aten.new_ones.default, scores, [rows, columns], dtype=torch.bool)
    return call(aten.tril.default, ones)


def _additive(call: Callable[..., fx.Node], mask: fx.Node, scores: fx.Node) -> fx.Node:
    """The mask in the form that is added to the scores: 0 / -inf for a boolean one."""
    if mask.meta["val"].dtype != torch.bool:
        return mask
    hidden = call(aten.logical_not.default, mask)
    zeros = call(aten.zeros_like.default, hidden, dtype=scores.meta["val"].dtype)
    return call(aten.masked_fill.Scalar, zeros, hidden, float("-inf"))


def _split(gm: fx.GraphModule, node: fx.Node, fixed: set[fx.Node]) -> fx.Node:
    """Emits the products of a fused attention, and returns the node that replaces it."""

    def call(target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        return emit(gm, target, *args, like=node, **kwargs)

    options = arguments(node)
    query, key, value = options["query"], options["key"], options["value"]
    if options["enable_gqa"]:
        repeat = query.meta["val"].shape[-3] // key.meta["val"].shape[-3]
        key = call(aten.repeat_interleave.self_int, key, repeat, -3)
        value = call(aten.repeat_interleave.self_int, value, repeat, -3)
    scale = options["scale"]
    if scale is None:
        scale = float(query.meta["val"].shape[-1]) ** -0.5
    scores = call(aten.matmul.default, query, call(aten.transpose.int, key, -2, -1))
    scores = call(aten.mul.Tensor, scores, scale)
    mask = _causal(gm, call, scores) if options["is_causal"] else options["attn_mask"]
    if mask is not None:
        scores = call(aten.add.Tensor, scores, _additive(call, mask, scores))
    probabilities = call(aten.softmax.int, scores, -1)
    if options["attn_mask"] is not None and _may_hide_rows(gm, options["attn_mask"], fixed):
        hidden = _hidden_rows(options["attn_mask"], call)
        probabilities = call(aten.masked_fill.Scalar, probabilities, hidden, 0.0)
    return call(aten.matmul.default, probabilities, value)


def _hidden_rows(mask: Any, call: Callable[..., Any]) -> Any:
    """Rows that a mask hides completely, ``(…, N, 1)``, as a tensor or as a node like the mask.

    The attention of such a row is zero, where a softmax of -inf alone would be NaN.
    """
    dtype = (mask.meta["val"] if isinstance(mask, fx.Node) else mask).dtype
    if dtype == torch.bool:
        return call(aten.logical_not.default, call(aten.any.dim, mask, -1, True))
    return call(aten.all.dim, call(aten.eq.Scalar, mask, float("-inf")), -1, True)


def _may_hide_rows(gm: fx.GraphModule, mask: fx.Node, fixed: set[fx.Node]) -> bool:
    """Whether a mask may hide a whole row. A mask that depends on no image is computed."""
    if mask not in fixed:
        return True
    hidden = _hidden_rows(_value(gm, mask, {}), lambda target, *args: target(*args))
    return bool(hidden.any())


def _image_independent(gm: fx.GraphModule) -> set[fx.Node]:
    """The nodes whose values depend on parameters and sizes alone."""
    fixed: set[fx.Node] = set()
    for node in gm.graph.nodes:
        computed = _is_pure(node) and fixed.issuperset(node.all_input_nodes)
        if node.op == "get_attr" or is_size(node) or computed:
            fixed.add(node)
    return fixed


def _is_pure(node: fx.Node) -> bool:
    """Whether an operation yields the same value whenever it reads the same inputs."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return target in DATA_MOVEMENT_OPS
    return not target._schema.is_mutable and torch.Tag.nondeterministic_seeded not in target.tags


def _value(gm: fx.GraphModule, node: fx.Node, memo: dict[fx.Node, Any]) -> Any:
    """Value of a node that depends on no image, for the batch size of the example."""
    if node not in memo:
        if is_size(node):
            memo[node] = example_size(node.meta["val"])
        elif node.op == "get_attr":
            memo[node] = get_parameter(gm, node)
        else:
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: _value(gm, n, memo))
            memo[node] = node.target(*args, **kwargs)  # type: ignore[operator]
    return memo[node]


@dataclass(frozen=True)
class SplitAttention:
    """Splits fused attention into its products."""

    requires: ClassVar[Stage] = Stage.FLOAT
    ensures: ClassVar[Stage] = Stage.FLOAT

    @torch.no_grad()
    def run(self, gm: fx.GraphModule) -> PassResult:
        """Splits every fused attention."""
        fused = [node for node in gm.graph.nodes if node.target is _FUSED]
        fixed = _image_independent(gm)
        for node in fused:
            with gm.graph.inserting_before(node):
                node.replace_all_uses_with(_split(gm, node, fixed))
            gm.graph.erase_node(node)
        return PassResult(len(fused))

"""Sites at which an affine map of channels can be folded into the linears that read them.

The source of the channels is a norm, which scales and shifts them by its weight and bias, or a
linear, whose rows yield them. Between the source and the linears, data movement alone is allowed,
and attention that averages the channels over tokens: ``A (V - shift) / divide`` is ``A V`` with the
same division and, where the rows of A sum to one, the same shift. In this way, a map of attention
values ``V`` folds into the output projection.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fxquant.graph.dialect import DATA_MOVEMENT_OPS, aten
from fxquant.graph.nodes import (
    constant,
    data_users,
    evaluate_moves,
    operand,
    operation_name,
    skip_data_movement,
)
from fxquant.graph.products import Product
from fxquant.graph.shapes import example_shape
from fxquant.graph.softmax import SOFTMAX_OPS, is_along_rows, is_deferred_division
from fxquant.utils.notes import Refusal

_NORMS = (aten.layer_norm.default, aten.rms_norm.default)
_LINEAR = aten.linear.default


@dataclass(frozen=True)
class Site:
    """A norm or linear whose output linears alone read, with channels in order on the last axis.

    Attributes:
        source: a layer norm or an rms norm with a constant weight ``(C,)``, or a linear with a
            constant weight ``(C, in)``.
        linears: all readers of the source behind data movement and attention products; each has a
            constant weight ``(out, C)``.
        products: the attention products in between, whose right operand holds the channels.
        shiftable: whether the fold may shift channels. It may not where zeros are padded in
            between, which would have to become ``-shift / divide``; at an rms norm, which adds no
            ``beta``; and where an attention product does not average.
    """

    source: fx.Node
    linears: tuple[fx.Node, ...]
    products: tuple[fx.Node, ...]
    shiftable: bool


def norm_sites(gm: fx.GraphModule) -> Iterator[tuple[fx.Node, Site | Refusal]]:
    """Each norm that feeds a linear, with its site or the reason why a fold is not exact."""
    return _find(gm, _NORMS)


def linear_sites(gm: fx.GraphModule) -> Iterator[tuple[fx.Node, Site | Refusal]]:
    """Each linear that feeds a linear, with its site or the reason why a fold is not exact."""
    return _find(gm, (_LINEAR,))


def _find(gm: fx.GraphModule, targets: tuple[Any, ...]) -> Iterator[tuple[fx.Node, Site | Refusal]]:
    for node in list(gm.graph.nodes):
        if node.target in targets:
            flow = _Flow(node)
            if any(reader.target is _LINEAR for reader, _ in flow.readers):
                yield node, _site(gm, flow)


def added_bias(node: fx.Node) -> Any:
    """The bias that a layer norm or a linear adds, None without one."""
    index = 2 if node.target is _LINEAR else 3
    adds = node.target is not aten.rms_norm.default and len(node.args) > index
    return node.args[index] if adds else None


class _Flow:
    """The readers of a node's values.

    Attributes:
        source: the node.
        readers: readers of the values behind data movement and attention products, each with the
            node that it reads.
        products: the attention products in between, in graph order.
        divisions: the divisions of deferred softmax (``passes.DeferSoftmax``) by their product.
    """

    def __init__(self, source: fx.Node) -> None:
        self.source = source
        self.readers: list[tuple[fx.Node, fx.Node]] = []
        self.products: list[fx.Node] = []
        self.divisions: dict[fx.Node, fx.Node] = {}
        pending = [source]
        for node in pending:
            for user in data_users(node):
                if user.target in DATA_MOVEMENT_OPS:
                    pending.append(user)
                elif user.target is aten.matmul.default and _averages_rows_of(user, node, source):
                    pending.append(user)
                    self.products.append(user)
                elif is_deferred_division(user, node):
                    pending.append(user)
                    self.divisions[node] = user
                else:
                    self.readers.append((user, node))


def _averages_rows_of(product: fx.Node, node: fx.Node, source: fx.Node) -> bool:
    """Whether an attention product has ``node``, whose rows a linear yields, on its right alone."""
    return source.target is _LINEAR and product.args[1] is node and product.args[0] is not node


def _site(gm: fx.GraphModule, flow: _Flow) -> Site | Refusal:
    source = flow.source
    reason = _source_refusal(gm, source)
    if reason:
        return Refusal(reason)
    shape = example_shape(source)
    # Channels are numbered from one: zeros are padding.
    numbers = torch.arange(1.0, shape[-1] + 1, dtype=torch.float64)
    memo: dict[fx.Node, Any] = {}
    averaged = True
    for product in flow.products:
        channels = evaluate_moves(operand(product, 1), source, numbers.expand(shape), memo)
        if not bool((channels == channels[..., :1, :]).all()):
            return Refusal(f"its channels do not stay on the last axis on their way to {product}")
        output = example_shape(product)
        memo[product] = channels[..., :1, :].expand(*output[:-2], -1, -1).expand(output)
        division = flow.divisions.get(product)
        if division is None:
            averaged &= rows_sum_to_one(operand(product, 0))
        else:
            memo[division] = memo[product]
            averaged &= len(data_users(product)) == 1
    padded = False
    for reader, node in flow.readers:
        reason = _reader_refusal(gm, reader)
        if reason:
            return Refusal(reason)
        channels = evaluate_moves(node, source, numbers.expand(shape), memo)
        if channels.shape[-1] != shape[-1] or bool(((channels != numbers) & (channels != 0)).any()):
            return Refusal(
                f"its channels do not stay in order on the last axis on their way to {reader}"
            )
        padded |= bool((channels == 0).any())
    shiftable = source.target is not aten.rms_norm.default and averaged and not padded
    linears = tuple(reader for reader, _ in flow.readers)
    return Site(source, linears, tuple(flow.products), shiftable)


def rows_sum_to_one(weights: fx.Node) -> bool:
    """Whether rows of a matrix sum to one: its last axis is the axis of a softmax, in order."""
    softmax = skip_data_movement(weights)
    if softmax.target not in SOFTMAX_OPS or not is_along_rows(softmax):
        return False
    shape = example_shape(softmax)
    numbers = torch.arange(1.0, shape[-1] + 1)
    columns: Tensor = evaluate_moves(weights, softmax, numbers.expand(shape), {})
    return columns.shape[-1] == shape[-1] and bool((columns == numbers).all())


def _source_refusal(gm: fx.GraphModule, source: fx.Node) -> str | None:
    if source.target is _LINEAR:
        parameters = [source.args[1], added_bias(source)]
    else:
        axes = source.args[1]
        if isinstance(axes, list | tuple) and len(axes) != 1:
            return f"it normalises over {len(axes)} axes, and a linear reads one"
        if len(source.args) < 3 or source.args[2] is None:
            return "it has no weight to fold into"
        parameters = [source.args[2], added_bias(source)]
    if any(value is not None and constant(gm, value) is None for value in parameters):
        return "its weight or bias is computed"
    return None


def _reader_refusal(gm: fx.GraphModule, reader: fx.Node) -> str | None:
    if reader.op == "output":
        return "the model outputs it too"
    if reader.target is not _LINEAR:
        return f"{reader} ({operation_name(reader)}) reads it too, and is not a linear"
    linear = Product(gm, reader)
    if not linear.has_constant_weight or linear.has_computed_bias:
        return f"the weight or bias of {reader} is computed"
    return None

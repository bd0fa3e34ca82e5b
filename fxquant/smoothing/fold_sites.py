"""Where an affine map of channels can move from what writes them into the linears that read them.

A norm writes channels by its weight and bias, a linear by its rows. Between the two, values may
only move, or be averaged over tokens by attention: ``A (V - shift) / divide`` is ``A V`` divided
alike and, where the rows of A sum to one, shifted alike. So values ``V`` fold into the output
projection behind them.
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
    rank,
    skip_data_movement,
)
from fxquant.graph.products import Product
from fxquant.graph.shapes import example_shape

_NORMS = (aten.layer_norm.default, aten.rms_norm.default)
_LINEAR = aten.linear.default
_SOFTMAX = (aten.softmax.int, aten._softmax.default)


@dataclass(frozen=True)
class Site:
    """A norm or linear whose output reaches linears alone, its channels in order on the last axis.

    Attributes:
        source: a layer norm or an rms norm with a constant weight ``(C,)``, or a linear with a
            constant weight ``(C, in)``.
        linears: all that reads the source, data movement looked through; constant weights
            ``(out, C)``.
        products: the attention products in between, whose right operand holds the channels.
        shiftable: whether the fold may shift. Not where zeros are padded in between, which would
            have to become ``-shift / divide``; at an rms norm, which adds no ``beta``; or where an
            attention product is no average.
    """

    source: fx.Node
    linears: tuple[fx.Node, ...]
    products: tuple[fx.Node, ...]
    shiftable: bool


def norm_sites(gm: fx.GraphModule) -> Iterator[tuple[fx.Node, Site | str]]:
    """Each norm that feeds a linear: its site, or a clause saying why the fold is not exact."""
    return _find(gm, _NORMS)


def linear_sites(gm: fx.GraphModule) -> Iterator[tuple[fx.Node, Site | str]]:
    """The same of each linear that feeds a linear."""
    return _find(gm, (_LINEAR,))


def _find(gm: fx.GraphModule, targets: tuple[Any, ...]) -> Iterator[tuple[fx.Node, Site | str]]:
    for node in list(gm.graph.nodes):
        if node.target in targets:
            flow = _Flow(node)
            if any(reader.target is _LINEAR for reader, _ in flow.readers):
                yield node, _site(gm, flow)


def added_bias(node: fx.Node) -> Any:
    """What a layer norm or a linear adds, None for nothing."""
    index = 2 if node.target is _LINEAR else 3
    adds = node.target is not aten.rms_norm.default and len(node.args) > index
    return node.args[index] if adds else None


class _Flow:
    """Where the values of a node go.

    Attributes:
        source: the node.
        readers: all that reads its values, moves and attention products looked through, each with
            the node it reads.
        products: those attention products, in graph order.
    """

    def __init__(self, source: fx.Node) -> None:
        self.source = source
        self.readers: list[tuple[fx.Node, fx.Node]] = []
        self.products: list[fx.Node] = []
        pending = [source]
        for node in pending:
            for user in data_users(node):
                if user.target in DATA_MOVEMENT_OPS:
                    pending.append(user)
                elif user.target is aten.matmul.default and _carries(user, node, source):
                    pending.append(user)
                    self.products.append(user)
                else:
                    self.readers.append((user, node))


def _carries(product: fx.Node, node: fx.Node, source: fx.Node) -> bool:
    """Whether a product averages rows of ``node``, its right operand, that come from a linear."""
    return source.target is _LINEAR and product.args[1] is node and product.args[0] is not node


def _site(gm: fx.GraphModule, flow: _Flow) -> Site | str:
    source = flow.source
    reason = _source_refusal(gm, source)
    if reason:
        return reason
    shape = example_shape(source)
    # Channels count from one, so that zero is what was padded.
    numbers = torch.arange(1.0, shape[-1] + 1, dtype=torch.float64)
    memo: dict[fx.Node, Any] = {}
    averaged = True
    for product in flow.products:
        seen = evaluate_moves(operand(product, 1), source, numbers.expand(shape), memo)
        if not bool((seen == seen[..., :1, :]).all()):
            return f"its channels do not stay on the last axis on their way to {product}"
        lead = seen[..., :1, :]
        given = example_shape(product)
        memo[product] = lead.expand(*given[:-2], -1, -1).expand(given)
        averaged &= _averages(operand(product, 0))
    padded = False
    for reader, node in flow.readers:
        reason = _reader_refusal(gm, reader)
        if reason:
            return reason
        seen = evaluate_moves(node, source, numbers.expand(shape), memo)
        if seen.shape[-1] != shape[-1] or bool(((seen != numbers) & (seen != 0)).any()):
            return f"its channels do not stay in order on the last axis on their way to {reader}"
        padded |= bool((seen == 0).any())
    shiftable = source.target is not aten.rms_norm.default and averaged and not padded
    linears = tuple(reader for reader, _ in flow.readers)
    return Site(source, linears, tuple(flow.products), shiftable)


def _averages(weights: fx.Node) -> bool:
    """Whether rows of a matrix sum to one: its last axis is that of a softmax, in its order."""
    softmax = skip_data_movement(weights)
    if softmax.target not in _SOFTMAX or softmax.args[1] not in (-1, rank(softmax) - 1):
        return False
    shape = example_shape(softmax)
    numbers = torch.arange(1.0, shape[-1] + 1)
    seen: Tensor = evaluate_moves(weights, softmax, numbers.expand(shape), {})
    return seen.shape[-1] == shape[-1] and bool((seen == numbers).all())


def _source_refusal(gm: fx.GraphModule, source: fx.Node) -> str | None:
    if source.target is _LINEAR:
        given = [source.args[1], added_bias(source)]
    else:
        axes = source.args[1]
        if isinstance(axes, list | tuple) and len(axes) != 1:
            return f"it normalises over {len(axes)} axes, and a linear reads one"
        if len(source.args) < 3 or source.args[2] is None:
            return "it has no weight to fold into"
        given = [source.args[2], added_bias(source)]
    if any(value is not None and constant(gm, value) is None for value in given):
        return "its weight or bias is computed"
    return None


def _reader_refusal(gm: fx.GraphModule, reader: fx.Node) -> str | None:
    if reader.op == "output":
        return "the model outputs it too"
    if reader.target is not _LINEAR:
        kind = str(getattr(reader.target, "__name__", reader.target)).split(".")[0]
        return f"{reader} ({kind}) reads it too, which is no linear"
    linear = Product(gm, reader)
    if not linear.has_constant_weight or linear.has_computed_bias:
        return f"the weight or bias of {reader} is computed"
    return None

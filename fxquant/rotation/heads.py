"""Rotation of the channels of each head of attention.

Before: ``softmax(q k^T) v W^T`` with ``q = W_q x + b_q``, likewise k and v
After:  ``q' = R q``, ``k' = R k`` and ``v' = S v`` in the rows of the three linears, ``W S^T`` in
the columns of the output projection, for each head

``R`` and ``S`` are orthogonal matrices of one head: ``q'^T k' = q^T R^T R k = q^T k``. The channels
of a head are found by running the data movement on channel numbers, whatever its operations are.
Scores are rotated where nothing but data movement lies between the two linears and the product, and
values where nothing but data movement lies between product and output projection.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from fxquant.config.vocabulary import OpKind
from fxquant.graph.dialect import aten, op_kind
from fxquant.graph.nodes import (
    evaluate_moves,
    moved_readers,
    operand,
    operation_name,
    skip_data_movement,
)
from fxquant.graph.products import Product
from fxquant.graph.rewrite import replace_constant, set_bias
from fxquant.graph.shapes import example_shape
from fxquant.graph.softmax import SOFTMAX_OPS
from fxquant.utils.notes import Refusal


@dataclass(frozen=True)
class HeadSite:
    """The linears around an attention product, by the channels of each head.

    Attributes:
        rows: linears whose output channels are rotated, each with the channels ``(heads, width)``.
        columns: linears whose input channels undo the rotation, each with the channels.
    """

    rows: tuple[tuple[fx.Node, Tensor], ...]
    columns: tuple[tuple[fx.Node, Tensor], ...] = ()

    @property
    def shape(self) -> tuple[int, int]:
        """Number of heads, and number of channels of each."""
        heads, width = self.rows[0][1].shape
        return heads, width


def head_sites(gm: fx.GraphModule) -> Iterator[tuple[fx.Node, HeadSite | Refusal]]:
    """Each product of two activations, with its site or the reason why heads cannot be rotated.

    Args:
        gm: in the canonical dialect.
    """
    for node in list(gm.graph.nodes):
        if op_kind(node) is OpKind.MATMUL:
            yield node, _value_site(gm, node) if reads_softmax(node) else score_site(gm, node)


@torch.no_grad()
def turn_heads(gm: fx.GraphModule, site: HeadSite, rotations: Tensor) -> None:
    """Rotates the channels of each head; the function of the graph is unchanged.

    Args:
        gm: edited in place; the caller removes dead parameters.
        site: a site of this graph.
        rotations: ``(heads, width, width)`` orthogonal matrices in float64.
    """
    for linear, channels in site.rows:
        product = Product(gm, linear)
        weight, bias = product.weight.double(), product.bias
        matrices = rotations.to(weight.device)
        weight[channels] = matrices @ weight[channels]
        if bias is not None:
            turned = bias.double()
            turned[channels] = (matrices @ turned[channels].unsqueeze(-1)).squeeze(-1)
            set_bias(gm, linear, turned.to(bias.dtype))
        _set_weight(gm, product, weight)
    for linear, channels in site.columns:
        product = Product(gm, linear)
        weight = product.weight.double().T.contiguous()
        weight[channels] = rotations.to(weight.device) @ weight[channels]
        _set_weight(gm, product, weight.T)


def _set_weight(gm: fx.GraphModule, product: Product, weight: Tensor) -> None:
    node, name = product.node, f"{product.node.name}_weight"
    replace_constant(gm, node, product.weight_node, weight.to(product.weight.dtype), name)


def reads_softmax(product: fx.Node) -> bool:
    """Whether the left operand of a product is attention: a softmax, masked or mixed over heads."""
    node = skip_data_movement(operand(product, 0))
    while node.target in (aten.masked_fill.Scalar, aten.linear.default, aten.mul.Tensor):
        node = skip_data_movement(operand(node, 0))
    return node.target in SOFTMAX_OPS


def score_site(gm: fx.GraphModule, product: fx.Node) -> HeadSite | Refusal:
    """The linears of queries and of keys, in this order, whose channels a product sums over."""
    rows = []
    for index, channel_axis in ((0, -1), (1, -2)):
        linear = _linear_before(gm, product, index)
        if isinstance(linear, Refusal):
            return linear
        numbers = _channels_at(operand(product, index), linear)
        alike = numbers.narrow(-3 - channel_axis, 0, 1)
        if not bool((numbers == alike).all()):
            return Refusal(f"the channels of {linear} do not stay on the axis that is summed over")
        rows.append((linear, alike.squeeze(-3 - channel_axis)))
    (queries, query_channels), (keys, key_channels) = rows
    shape = torch.broadcast_shapes(query_channels.shape, key_channels.shape)  # type: ignore[no-untyped-call]
    pairs = torch.stack([query_channels.expand(shape), key_channels.expand(shape)], -1)
    pairs = _distinct(pairs.reshape(-1, *pairs.shape[-2:]))
    return _site((queries, pairs[..., 0]), (keys, pairs[..., 1]))


def _value_site(gm: fx.GraphModule, product: fx.Node) -> HeadSite | Refusal:
    linear = _linear_before(gm, product, 1)
    if isinstance(linear, Refusal):
        return linear
    numbers = _channels_at(operand(product, 1), linear)
    if not bool((numbers == numbers[..., :1, :]).all()):
        return Refusal(f"the channels of {linear} do not stay on the last axis")
    numbers = numbers[..., :1, :]
    site = _site((linear, _distinct(numbers.reshape(-1, numbers.shape[-1]))))
    if isinstance(site, Refusal):
        return site
    ((_, channels),) = site.rows
    shape, columns = example_shape(product), []
    numbers = numbers.expand(*shape[:-2], 1, shape[-1]).expand(shape)
    for reader, node in moved_readers(product):
        if not _is_plain_linear(gm, reader) or reader.args[0] is not node:
            return Refusal(f"{reader} ({operation_name(reader)}) reads the attention's output")
        order = evaluate_moves(node, product, numbers, {})
        if not bool((order == order.flatten(0, -2)[0]).all()):
            return Refusal(f"the channels of {linear} do not stay on the last axis up to {reader}")
        order = order.flatten(0, -2)[0]
        if sorted(order.tolist()) != sorted(channels.flatten().tolist()):
            return Refusal(f"{reader} does not read each channel of {linear} once: heads share it")
        columns.append((reader, order.argsort()[channels]))
    return HeadSite(site.rows, tuple(columns))


def _distinct(rows: Tensor) -> Tensor:
    """The distinct entries of a tensor along its first axis, sorted."""
    return torch.unique(rows, dim=0)  # type: ignore[no-any-return]


def _site(*rows: tuple[fx.Node, Tensor]) -> HeadSite | Refusal:
    """The site of some linears, if each of their channels belongs to one head."""
    for linear, channels in rows:
        width = int(linear.meta["val"].shape[-1])
        if channels.flatten().sort().values.tolist() != list(range(width)):
            return Refusal(f"a channel of {linear} does not belong to exactly one head")
    if rows[0][1].shape[-1] < 2:
        return Refusal("a head has one channel")
    return HeadSite(rows)


def _linear_before(gm: fx.GraphModule, product: fx.Node, index: int) -> fx.Node | Refusal:
    """The linear whose output, moved, is one operand of a product and is read by nothing else."""
    linear = skip_data_movement(operand(product, index))
    side = ("left", "right")[index]
    if not _is_plain_linear(gm, linear):
        return Refusal(f"{linear} ({operation_name(linear)}) computes its {side} operand")
    for reader, node in moved_readers(linear):
        if reader is not product:
            return Refusal(f"{reader} ({operation_name(reader)}) reads {linear} too")
        if reader.args[1 - index] is node:
            return Refusal(f"{linear} computes both operands")
    return linear


def _is_plain_linear(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node is a linear with constant parameters."""
    if node.target is not aten.linear.default:
        return False
    return Product(gm, node).has_constant_weight and not Product(gm, node).has_computed_bias


def _channels_at(node: fx.Node, linear: fx.Node) -> Tensor:
    """The output channel of a linear, from 0, at each element of a value; -1 at padding."""
    shape = example_shape(linear)
    numbers = torch.arange(1, shape[-1] + 1).expand(shape)
    moved: Tensor = evaluate_moves(node, linear, numbers, {}) - 1
    return moved

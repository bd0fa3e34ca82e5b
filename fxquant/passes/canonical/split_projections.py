"""Splits a packed projection into the projections packed in it.

Before: ``q, k, v = unbind(permute(reshape(linear(x, W), …)))``
After:  ``q = permute(reshape(linear(x, W[rows of q])))``, likewise k and v

``meta["packed"]`` of the new products is the name of the parameter that they were cut from.

Each of q, k and v then has its own weight to quantize, and a backend can write codes directly from
each product. The rows of a branch are not derived from the operations: the data movement runs on a
tensor that numbers output channels. In this way every packing (ViT's, LeViT's per-head one, that of
nn.MultiheadAttention) is handled alike. A branch that mixes tokens and channels on one axis, lacks
tokens or changes their order is refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from fxquant.config.vocabulary import Stage
from fxquant.graph.dialect import DATA_MOVEMENT_OPS, aten
from fxquant.graph.meta import PACKED_WEIGHT
from fxquant.graph.nodes import data_users, evaluate_moves
from fxquant.graph.products import Product
from fxquant.graph.rewrite import add_constant, emit
from fxquant.graph.shapes import example_shape
from fxquant.passes.base import PassResult, Refusal, skipped

# Data movement that can drop a part of its input: where branches of a packed projection begin.
_SELECTS = {
    aten.select.int,
    aten.slice.Tensor,
    aten.unbind.int,
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.chunk.default,
}


@dataclass(frozen=True)
class _Branch:
    """A single projection of a packed projection.

    Attributes:
        node: the node that yields its values.
        rows: output channels of the linear, in the order of the branch's channel axes.
        axes: for each axis of the branch, the axis of the linear's output that it is; -1 for a
            channel axis.
    """

    node: fx.Node
    rows: Tensor
    axes: tuple[int, ...]


def _leaves(linear: fx.Node) -> list[fx.Node]:
    """The first nodes of the branches; empty where the projection is not packed."""
    node = linear
    while node.target not in _SELECTS:
        users = data_users(node)
        if len(users) > 1 and all(u.target in _SELECTS for u in users):
            return users
        if len(users) != 1 or users[0].target not in DATA_MOVEMENT_OPS:
            return []
        node = users[0]
    if node.target in (aten.select.int, aten.slice.Tensor):
        return []
    return list(node.users)


def _varies(index: Tensor) -> tuple[bool, ...]:
    """Tells for each axis whether values change along the axis."""
    return tuple(
        index.shape[axis] > 1 and not torch.equal(index, index.narrow(axis, 0, 1).expand_as(index))
        for axis in range(index.ndim)
    )


def _branch(linear: fx.Node, node: fx.Node) -> _Branch | Refusal:
    """The branch that begins at ``node``, or the reason why it cannot be a projection itself."""
    shape = example_shape(linear)
    if any(size == 1 for size in shape[:-1]):
        return Refusal("an axis of length one hides which axis it is")
    axes = [-1] * node.meta["val"].ndim
    indices = []
    for axis, size in enumerate(shape):
        view = [1] * len(shape)
        view[axis] = size
        indices.append(
            evaluate_moves(node, linear, torch.arange(size).view(view).expand(shape), {})
        )
    *leading, channels = indices
    of_channels = _varies(channels)
    for axis, index in enumerate(leading):
        place = _place(index, shape[axis], of_channels)
        if isinstance(place, Refusal):
            return Refusal(f"at {node.name} {place}")
        axes[place] = axis
    rows = channels[tuple(slice(None) if axis == -1 else 0 for axis in axes)]
    return _Branch(node, rows, tuple(axes))


def _place(index: Tensor, size: int, of_channels: tuple[bool, ...]) -> int | Refusal:
    """The axis of a branch that one leading axis of the linear becomes, or why there is none.

    Args:
        index: for each value of the branch, its position along the linear's axis.
        size: length of the linear's axis.
        of_channels: for each axis of the branch, whether output channels change along it.
    """
    along = [axis for axis, varies in enumerate(_varies(index)) if varies]
    if any(of_channels[axis] for axis in along):
        return Refusal("tokens and channels are mixed on one axis")
    if bool((index.flatten().bincount(minlength=size) == 0).any()):
        return Refusal("its tokens are split")
    if len(along) > 1:
        return Refusal("its tokens are spread over several axes")
    order = index.transpose(0, along[0]).flatten(1)[:, 0]
    if not torch.equal(order, torch.arange(size)):
        return Refusal("its tokens change their order")
    return along[0]


def _rebuild(gm: fx.GraphModule, linear: fx.Node, branch: _Branch) -> fx.Node:
    """Replaces a branch by its own projection, and returns the new linear."""
    packed = Product(gm, linear)
    weight, bias = packed.weight, packed.bias
    rows = branch.rows.flatten()

    def call(target: Any, *args: Any) -> fx.Node:
        return emit(gm, target, *args, like=linear)

    with gm.graph.inserting_before(branch.node):
        parameters = [add_constant(gm, weight[rows], f"{linear.name}_weight", like=linear)]
        if bias is not None:
            parameters.append(add_constant(gm, bias[rows], f"{linear.name}_bias", like=linear))
        product = call(aten.linear.default, packed.input, *parameters)
        # A projection may be packed within a branch of another one: name the outermost weight.
        whole = PACKED_WEIGHT.get(linear) or str(packed.weight_node.target)
        PACKED_WEIGHT.set(product, whole)
        lead = sorted(axis for axis in branch.axes if axis != -1)
        sizes: list[Any] = []
        for axis in lead:
            size = product.meta["val"].shape[axis]
            symbolic = isinstance(size, torch.SymInt)
            sizes.append(call(aten.sym_size.int, product, axis) if symbolic else int(size))
        shaped = call(aten.reshape.default, product, [*sizes, *branch.rows.shape])
        place = iter(range(len(lead), len(branch.axes)))
        order = [lead.index(axis) if axis != -1 else next(place) for axis in branch.axes]
        moved = call(aten.permute.default, shaped, order)
    branch.node.replace_all_uses_with(moved)
    return product


@dataclass(frozen=True)
class SplitProjections:
    """Splits packed projections."""

    requires: ClassVar[Stage] = Stage.FLOAT
    ensures: ClassVar[Stage] = Stage.FLOAT

    @torch.no_grad()
    def run(self, gm: fx.GraphModule) -> PassResult:
        """Splits every packed projection with constant weights."""
        changed, notes = 0, []
        pending = [n for n in gm.graph.nodes if n.target is aten.linear.default]
        for linear in pending:
            leaves = _leaves(linear)
            if not leaves:
                continue
            projections = _split(gm, linear, leaves)
            if isinstance(projections, Refusal):
                notes.append(skipped(linear.name, f"the packed projection stays: {projections}"))
            else:
                changed += 1
                pending += projections  # each may be packed too
        gm.graph.eliminate_dead_code()
        gm.delete_all_unused_submodules()
        return PassResult(changed, tuple(notes))


def _split(gm: fx.GraphModule, linear: fx.Node, leaves: list[fx.Node]) -> list[fx.Node] | Refusal:
    """Splits a packed projection and returns its projections, or the reason why it stays."""
    packed = Product(gm, linear)
    if not packed.has_constant_weight or packed.has_computed_bias:
        return Refusal("its weight or bias is not a constant")
    branches = []
    for leaf in leaves:
        branch = _branch(linear, leaf)
        if isinstance(branch, Refusal):
            return branch
        branches.append(branch)
    rows = torch.cat([branch.rows.flatten() for branch in branches])
    width = int(linear.meta["val"].shape[-1])
    if len(branches) < 2 or not torch.equal(rows.sort().values, torch.arange(width)):
        return Refusal("its branches do not divide its output channels")
    return [_rebuild(gm, linear, branch) for branch in branches]

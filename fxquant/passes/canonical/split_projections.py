"""Splits a packed projection into the projections packed in it.

Before: ``q, k, v = unbind(permute(reshape(linear(x, W), …)))``
After:  ``q = permute(reshape(linear(x, W[rows of q])))``, likewise k and v

``meta["packed"]`` of the new products is the name of the parameter that they were cut from.

Each of q, k and v then has a weight of its own to be quantized, and a backend can write its codes
straight from the product. Which rows a branch takes is not read off the operations: the moves are
run on a tensor of output-channel numbers, so that every packing (ViT's, LeViT's per-head one, that
of nn.MultiheadAttention) is handled alike. A branch whose axes mix tokens and channels, or whose
tokens are not all there in their order, is refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from fxquant.config.vocabulary import Stage
from fxquant.graph.dialect import DATA_MOVEMENT_OPS, aten
from fxquant.graph.nodes import constant, data_users, evaluate_moves, get_parameter
from fxquant.graph.rewrite import add_constant, emit
from fxquant.graph.shapes import example_shape
from fxquant.passes.base import PassResult, skipped

# Moves that can drop a part of their input: where branches of a packed projection part.
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
    """One part of a packed projection.

    Attributes:
        node: the node that yields it.
        rows: output channels of the linear, in the order of the branch's channel axes.
        axes: for each axis of the branch, the axis of the linear's output it runs along; -1 for
            a channel axis.
    """

    node: fx.Node
    rows: Tensor
    axes: tuple[int, ...]


def _leaves(linear: fx.Node) -> list[fx.Node]:
    """The nodes at which the projection has parted into branches; none if it is not packed."""
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
    """For each axis, whether the values change along it."""
    return tuple(
        index.shape[axis] > 1 and not torch.equal(index, index.narrow(axis, 0, 1).expand_as(index))
        for axis in range(index.ndim)
    )


def _branch(linear: fx.Node, node: fx.Node) -> _Branch | str:
    shape = example_shape(linear)
    if any(size == 1 for size in shape[:-1]):
        return "an axis of length one hides which axis it is"
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
        if isinstance(place, str):
            return f"at {node.name} {place}"
        axes[place] = axis
    rows = channels[tuple(slice(None) if axis == -1 else 0 for axis in axes)]
    return _Branch(node, rows, tuple(axes))


def _place(index: Tensor, size: int, of_channels: tuple[bool, ...]) -> int | str:
    """The axis of a branch that is one leading axis of the linear; the reason if there is none.

    Args:
        index: at each place of the branch, where it came from along the linear's axis.
        size: length of that axis.
        of_channels: for each axis of the branch, whether output channels change along it.
    """
    along = [axis for axis, varies in enumerate(_varies(index)) if varies]
    if any(of_channels[axis] for axis in along):
        return "tokens and channels are mixed on one axis"
    if bool((index.flatten().bincount(minlength=size) == 0).any()):
        return "its tokens are split"
    if len(along) > 1:
        return "its tokens are spread over several axes"
    order = index.transpose(0, along[0]).flatten(1)[:, 0]
    if not torch.equal(order, torch.arange(size)):
        return "its tokens change their order"
    return along[0]


def _rebuild(gm: fx.GraphModule, linear: fx.Node, branch: _Branch) -> fx.Node:
    """Replaces the branch by a projection of its own, which is returned."""
    source, weight = linear.args[0], get_parameter(gm, linear.args[1])  # type: ignore[arg-type]
    bias = constant(gm, linear.args[2] if len(linear.args) > 2 else None)
    rows = branch.rows.flatten()

    def call(target: Any, *args: Any) -> fx.Node:
        return emit(gm, target, *args, like=linear)

    with gm.graph.inserting_before(branch.node):
        parts = [add_constant(gm, weight[rows], f"{linear.name}_weight", like=linear)]
        if bias is not None:
            parts.append(add_constant(gm, bias[rows], f"{linear.name}_bias", like=linear))
        product = call(aten.linear.default, source, *parts)
        # A projection packed in a part of another belongs to the whole.
        product.meta["packed"] = linear.meta.get("packed", str(linear.args[1].target))  # type: ignore[union-attr]
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
    """See the module's text."""

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
            parts = _split(gm, linear, leaves)
            if isinstance(parts, str):
                notes.append(skipped(linear.name, f"the packed projection stays: {parts}"))
            else:
                changed += 1
                pending += parts  # each may be packed in turn
        gm.graph.eliminate_dead_code()
        gm.delete_all_unused_submodules()
        return PassResult(changed, tuple(notes))


def _split(gm: fx.GraphModule, linear: fx.Node, leaves: list[fx.Node]) -> list[fx.Node] | str:
    """Splits one projection into those returned; the reason where it stays."""
    bias = linear.args[2] if len(linear.args) > 2 else None
    if constant(gm, linear.args[1]) is None or (bias is not None and constant(gm, bias) is None):
        return "its weight or bias is no constant"
    branches = []
    for leaf in leaves:
        branch = _branch(linear, leaf)
        if isinstance(branch, str):
            return branch
        branches.append(branch)
    rows = torch.cat([branch.rows.flatten() for branch in branches])
    width = int(linear.meta["val"].shape[-1])
    if len(branches) < 2 or not torch.equal(rows.sort().values, torch.arange(width)):
        return "its branches do not divide its output channels"
    return [_rebuild(gm, linear, branch) for branch in branches]

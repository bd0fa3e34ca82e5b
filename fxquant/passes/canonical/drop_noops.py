"""Removes operations that compute nothing in eval mode.

Before: ``y = dropout(x, p, train=False)``, ``y = clone(x)``, ``y = to(x, x.dtype)``
After:  ``y = x``

A copy stays where a later operation may depend on the strides of its input. ``view`` becomes
``reshape``, since its input may be contiguous because of a dropped ``clone`` alone. ``reshape_as``
becomes ``reshape`` to that size, and in this way no longer reads the other tensor's values.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import SymInt, Tensor, fx

from fxquant.config.vocabulary import Stage
from fxquant.graph.dialect import DATA_MOVEMENT_OPS, aten
from fxquant.graph.nodes import operand
from fxquant.graph.rewrite import emit
from fxquant.passes.base import PassResult

# Checks at run time, which export adds.
_CHECKS = {
    aten._assert_scalar.default,
    aten._assert_async.msg,
    aten._assert_tensor_metadata.default,
    aten.sym_constrain_range.default,
    aten.sym_constrain_range_for_size.default,
}

_VIEWS = {aten.view.default, aten._unsafe_view.default}
_LIKE = {aten.reshape_as.default, aten.view_as.default}

# Operators that change the strides of a value, and operators that depend on strides.
_COPIES = {aten.clone.default, aten.contiguous.default, aten._to_copy.default}
_STRIDED = {
    aten.view_as_complex.default,
    aten.view.dtype,
    aten.as_strided.default,
    aten.sym_stride.int,
    aten.sym_storage_offset.default,
}


def _reshape_to_size(gm: fx.GraphModule, node: fx.Node) -> None:
    """Turns ``reshape_as`` into ``reshape`` to the size of the other tensor."""
    other = operand(node, 1)
    with gm.graph.inserting_before(node):
        sizes = [
            emit(gm, aten.sym_size.int, other, i, like=node) if isinstance(n, SymInt) else n
            for i, n in enumerate(other.meta["val"].shape)
        ]
    node.target = aten.reshape.default
    node.args = (operand(node, 0), sizes)


def _same_type(node: fx.Node) -> bool:
    before, after = operand(node, 0).meta.get("val"), node.meta.get("val")
    return (
        isinstance(before, Tensor)
        and isinstance(after, Tensor)
        and bool((before.dtype, before.device) == (after.dtype, after.device))
    )


def _strides_matter(node: fx.Node) -> bool:
    """Whether a reader, directly or behind data movement, may depend on a value's strides."""
    for user in node.users:
        target = user.target
        if target in DATA_MOVEMENT_OPS or target in _NOOPS or target in _LIKE:
            if _strides_matter(user):
                return True
        elif target in _STRIDED or (
            isinstance(target, torch._ops.HigherOrderOperator)
            or (isinstance(target, torch._ops.OpOverload) and target.namespace != "aten")
        ):
            return True
    return False


def _always(node: fx.Node) -> bool:
    return True


def _not_training(node: fx.Node) -> bool:
    return bool(node.args[1] == 0) or not (len(node.args) > 2 and node.args[2])


# Operator -> whether a node of it computes nothing.
_NOOPS: dict[Any, Callable[[fx.Node], bool]] = {
    aten.clone.default: _always,
    aten.contiguous.default: _always,
    aten.detach.default: _always,
    aten.alias.default: _always,
    aten.lift_fresh_copy.default: _always,
    aten.dropout.default: _not_training,
    aten.feature_dropout.default: _not_training,
    aten.alpha_dropout.default: _not_training,
    aten.type_as.default: _same_type,
    aten.to.dtype: _same_type,
    aten.to.device: _same_type,
    aten.to.dtype_layout: _same_type,
    aten._to_copy.default: _same_type,
}


@dataclass(frozen=True)
class DropNoOps:
    """Removes operations that compute nothing in eval mode."""

    requires: ClassVar[Stage] = Stage.FLOAT
    ensures: ClassVar[Stage] = Stage.FLOAT

    def run(self, gm: fx.GraphModule) -> PassResult:
        """Removes no-ops, run-time checks and dead code."""
        changed = 0
        for node in list(gm.graph.nodes):
            if node.target in _CHECKS:
                gm.graph.erase_node(node)
                changed += 1
            elif node.target in _COPIES and _strides_matter(node):
                continue
            elif node.target in _NOOPS and _NOOPS[node.target](node):
                node.replace_all_uses_with(node.args[0])
                gm.graph.erase_node(node)
                changed += 1
            elif node.target in _VIEWS:
                node.target = aten.reshape.default
                changed += 1
            elif node.target in _LIKE:
                _reshape_to_size(gm, node)
                changed += 1
        gm.graph.eliminate_dead_code()
        return PassResult(changed)

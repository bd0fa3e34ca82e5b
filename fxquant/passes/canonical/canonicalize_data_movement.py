"""Replaces operations that only move values by one operator for each kind of movement.

Before: ``x.mT``, ``swapaxes(x, 1, 2)``, ``movedim(x, (0, 1), (1, 2))``, ``x.T``
After:  ``permute(x, order)``

Before: ``narrow(x, axis, start, length)``, ``ravel(x)``, ``concat(parts, axis)``
After:  ``x[start : start + length]`` along the axis, ``flatten(x)``, ``cat(parts, axis)``
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from fxquant.config.vocabulary import Stage
from fxquant.graph.dialect import aten
from fxquant.graph.nodes import operand, rank
from fxquant.passes.base import PassResult

# Operators that change the order of axes, and become permute.
_AXIS_ORDERS: set[Any] = {
    aten.mT.default,
    aten.adjoint.default,  # of real numbers
    aten.numpy_T.default,
    aten.swapaxes.default,
    aten.swapdims.default,
    aten.moveaxis.int,
    aten.moveaxis.intlist,
    aten.movedim.int,
    aten.movedim.intlist,
}

# Operators with another name in the dialect.
_SYNONYMS: dict[Any, Any] = {
    aten.ravel.default: aten.flatten.using_ints,
    aten.concat.default: aten.cat.default,
    aten.concatenate.default: aten.cat.default,
}


def _order(node: fx.Node) -> list[int]:
    """Axis of the input for each axis of the output, from an input whose sizes number its axes."""
    target: Any = node.target
    axes = torch.empty(tuple(range(rank(operand(node, 0)))), device="meta")
    return list(target(axes, *node.args[1:], **node.kwargs).shape)


def _rename(node: fx.Node) -> bool:
    """Renames a node to its operator in the dialect; False where the node stays."""
    if node.target in _AXIS_ORDERS:
        node.args, node.kwargs = (node.args[0], _order(node)), {}
        node.target = aten.permute.default
    elif node.target in _SYNONYMS:
        node.target = _SYNONYMS[node.target]
    elif node.target is aten.narrow.default:
        source, axis, start, length = node.args
        if not isinstance(start, int) or not isinstance(length, int):
            return False
        size = operand(node, 0).meta["val"].shape[axis]
        if start < 0:
            if not isinstance(size, int):
                return False
            start += size
        node.args = (source, axis, start, start + length)
        node.target = aten.slice.Tensor
    else:
        return False
    return True


@dataclass(frozen=True)
class CanonicalizeDataMovement:
    """Renames operations that only move values."""

    requires: ClassVar[Stage] = Stage.FLOAT
    ensures: ClassVar[Stage] = Stage.FLOAT

    def run(self, gm: fx.GraphModule) -> PassResult:
        """Renames all operations; a ``narrow`` whose start changes with the batch stays."""
        return PassResult(sum([_rename(node) for node in gm.graph.nodes]))

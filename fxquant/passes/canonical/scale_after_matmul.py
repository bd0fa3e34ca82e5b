"""Moves a scalar factor from an operand of a matmul to its result.

Before: ``y = (c a) @ b``, ``y = a @ (c b)`` or ``y = (a / d) @ b`` with ``c = 1 / d``
After:  ``y = c (a @ b)``

Attention then has one form, whether its author scaled queries, keys or scores, and a backend folds
the factor into the output scale of the product.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from fxquant.config.vocabulary import Stage
from fxquant.graph.dialect import DATA_MOVEMENT_OPS, aten
from fxquant.graph.nodes import constant
from fxquant.graph.rewrite import emit
from fxquant.passes.base import PassResult


@dataclass(frozen=True)
class _Scaling:
    """An operation that multiplies by a number: ``node = source * factor``."""

    node: fx.Node
    source: fx.Node
    factor: float


def _number(gm: fx.GraphModule, value: object) -> float | None:
    """The value of a Python number or of a constant with one element, else None."""
    if isinstance(value, int | float):
        return float(value)
    tensor = constant(gm, value)
    return float(tensor) if tensor is not None and tensor.numel() == 1 else None


def _as_scaling(gm: fx.GraphModule, node: fx.Node) -> _Scaling | None:
    """The scalar multiplication or division that a node is, None for other nodes."""
    if node.target not in (aten.mul.Tensor, aten.div.Tensor):
        return None
    divides = node.target is aten.div.Tensor
    for source, factor in (node.args, node.args[::-1])[: 1 if divides else 2]:
        number = _number(gm, factor)
        if not isinstance(source, fx.Node) or number is None or (divides and number == 0):
            continue
        old, new = source.meta["val"], node.meta["val"]
        if (old.dtype, old.ndim) == (new.dtype, new.ndim):  # the factor may widen either
            return _Scaling(node, source, 1 / number if divides else number)
    return None


def _scaling(gm: fx.GraphModule, node: object) -> _Scaling | None:
    """The scalar multiplication that alone feeds the data movement that ends in ``node``."""
    while isinstance(node, fx.Node) and len(node.users) == 1:
        scaling = _as_scaling(gm, node)
        if scaling is not None:
            return scaling
        if node.target not in DATA_MOVEMENT_OPS or node.target is aten.pad.default:
            return None  # the padding value need not be zero
        node = node.args[0]
    return None


@dataclass(frozen=True)
class ScaleAfterMatmul:
    """Moves scalar factors from operands of matmuls to their results."""

    requires: ClassVar[Stage] = Stage.FLOAT
    ensures: ClassVar[Stage] = Stage.FLOAT

    def run(self, gm: fx.GraphModule) -> PassResult:
        """Moves factors until no operand carries one."""
        changed = 0
        for node in [n for n in gm.graph.nodes if n.target is aten.matmul.default]:
            factor = 1.0
            for index in (0, 1):
                while (scaling := _scaling(gm, node.args[index])) is not None:
                    times = 2 if node.args[0] is node.args[1] else 1
                    factor *= scaling.factor**times
                    scaling.node.replace_all_uses_with(scaling.source)
                    gm.graph.erase_node(scaling.node)
                    changed += 1
            if factor != 1.0:
                with gm.graph.inserting_after(node):
                    scaled = emit(gm, aten.mul.Tensor, node, factor, like=node)
                node.replace_all_uses_with(scaled, delete_user_cb=lambda u, s=scaled: u is not s)
        gm.graph.eliminate_dead_code()
        return PassResult(changed)

"""Moves a scalar factor from an operand of a matmul to its result.

Before: ``y = (c a) @ b`` or ``y = a @ (c b)``
After:  ``y = c (a @ b)``

Attention then has one form, whichever way its author scaled the queries, and a backend folds the
factor into the product's output scale.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from fxquant.graph import MOVES, aten, operand
from fxquant.passes.base import PassResult
from fxquant.rewrite import emit
from fxquant.spec import Stage


def _scaling(node: object) -> fx.Node | None:
    """The scalar multiplication that alone feeds a chain of moves ending in ``node``."""
    while isinstance(node, fx.Node) and len(node.users) == 1:
        if node.target is aten.mul.Tensor and isinstance(node.args[1], int | float):
            return node
        if node.target not in MOVES or node.target is aten.pad.default:
            return None  # what is padded with need not be zero
        node = node.args[0]
    return None


@dataclass(frozen=True)
class ScaleAfterMatmul:
    """See the module's text."""

    requires: ClassVar[Stage] = Stage.FLOAT
    ensures: ClassVar[Stage] = Stage.FLOAT

    def run(self, gm: fx.GraphModule) -> PassResult:
        """Moves factors until no operand carries one."""
        changed = 0
        for node in [n for n in gm.graph.nodes if n.target is aten.matmul.default]:
            factor = 1.0
            for index in (0, 1):
                while (scaling := _scaling(node.args[index])) is not None:
                    times = 2 if node.args[0] is node.args[1] else 1
                    factor *= float(scaling.args[1]) ** times  # type: ignore[arg-type]
                    scaling.replace_all_uses_with(operand(scaling, 0))
                    gm.graph.erase_node(scaling)
                    changed += 1
            if factor != 1.0:
                with gm.graph.inserting_after(node):
                    scaled = emit(gm, aten.mul.Tensor, node, factor, like=node)
                node.replace_all_uses_with(scaled, delete_user_cb=lambda u, s=scaled: u is not s)
        return PassResult(changed)

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

from fxquant.graph import MOVES, aten, emit
from fxquant.passes.base import PassResult
from fxquant.spec import Stage


def _scaling(node: object) -> fx.Node | None:
    """The scalar multiplication that alone feeds a chain of moves ending in ``node``."""
    while isinstance(node, fx.Node) and len(node.users) == 1:
        if node.target is aten.mul.Tensor and isinstance(node.args[1], int | float):
            return node
        if node.target not in MOVES:
            return None
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
            for operand in node.args:
                while (scaling := _scaling(operand)) is not None:
                    factor *= float(scaling.args[1])  # type: ignore[arg-type]
                    source = scaling.args[0]
                    scaling.replace_all_uses_with(source)  # type: ignore[arg-type]
                    gm.graph.erase_node(scaling)
                    changed += 1
                    if operand is scaling:
                        break
            if factor != 1.0:
                with gm.graph.inserting_after(node):
                    scaled = emit(gm, aten.mul.Tensor, node, factor, like=node)
                node.replace_all_uses_with(scaled, delete_user_cb=lambda u, s=scaled: u is not s)
        return PassResult(changed)

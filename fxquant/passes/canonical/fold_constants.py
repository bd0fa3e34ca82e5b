"""Computes operations on parameters alone once, at compile time.

Before: ``bias = permute(index(table, position), …)`` in every forward
After:  ``bias = get_attr``

Swin's relative position bias, a transposed weight and a normalized kernel become plain constants,
so that other passes recognize a weight. torchvision's attention mask becomes a constant too: it
starts from ``x.new_zeros(…)``, which depends on the type and device of ``x`` alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from fxquant.config.vocabulary import Stage
from fxquant.graph.dialect import DATA_MOVEMENT_OPS, aten
from fxquant.graph.nodes import get_parameter
from fxquant.graph.rewrite import add_constant
from fxquant.passes.base import PassResult

# expand costs nothing at run time, and much memory as a constant.
_NOT_FOLDED = {aten.expand.default, aten.sym_size.int}


def _is_foldable(node: fx.Node, known: dict[fx.Node, Any]) -> bool:
    """Whether an operation reads constants alone, and yields the same value in each run."""
    if node.op != "call_function" or node.target in _NOT_FOLDED:
        return False
    if not all(source in known for source in node.all_input_nodes):
        return False
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return target in DATA_MOVEMENT_OPS
    return not target._schema.is_mutable and torch.Tag.nondeterministic_seeded not in target.tags


def _zeros(node: fx.Node) -> Tensor | None:
    """The tensor that ``new_zeros`` yields, None for other nodes and for a symbolic size."""
    if node.target is not aten.new_zeros.default:
        return None
    val = node.meta["val"]
    if not all(isinstance(size, int) for size in val.shape):
        return None
    return torch.zeros(tuple(val.shape), dtype=val.dtype, device=val.device)


@dataclass(frozen=True)
class FoldConstants:
    """Folds operations on parameters alone into constants."""

    requires: ClassVar[Stage] = Stage.FLOAT
    ensures: ClassVar[Stage] = Stage.FLOAT

    @torch.no_grad()
    def run(self, gm: fx.GraphModule) -> PassResult:
        """Folds each operation whose inputs are constants."""
        known: dict[fx.Node, Any] = {}
        folded = []
        for node in list(gm.graph.nodes):
            if node.op == "get_attr":
                known[node] = get_parameter(gm, node)
            elif (zeros := _zeros(node)) is not None:
                known[node] = zeros
                folded.append(node)
            elif _is_foldable(node, known):
                args, kwargs = fx.map_arg((node.args, node.kwargs), known.__getitem__)
                known[node] = node.target(*args, **kwargs)
                folded.append(node)
        inside = set(folded)
        for node in folded:
            value = known[node]
            if isinstance(value, Tensor) and any(user not in inside for user in node.users):
                with gm.graph.inserting_before(node):
                    constant = add_constant(gm, value, f"constant_{node.name}", like=node)
                node.replace_all_uses_with(constant, delete_user_cb=lambda u: u not in inside)
        gm.graph.eliminate_dead_code()
        gm.delete_all_unused_submodules()
        return PassResult(len(folded))

"""Rounds biases to the grid of the integer accumulator.

Before: ``linear(q(x), q(W), b)``
After:  ``linear(q(x), q(W), b')`` with ``b' = round(b / (s_x s_w)) s_x s_w``

An integer kernel adds the bias to its int32 accumulator, whose unit is the product of the two
scales; so the simulation does the same. The move is at most half such a unit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from fxquant.graph import add_constant, constant, op_kind, submodule
from fxquant.passes.base import PassResult, Skip
from fxquant.quantizers import INT32_MAX, UniformQuantizer, accumulator_scale
from fxquant.spec import OpKind, Stage

def _unit(gm: fx.GraphModule, node: fx.Node) -> Tensor | str:
    """Unit of the accumulator, or the reason why the operation has none."""
    pair = [submodule(gm, s) if isinstance(s, fx.Node) else None for s in node.args[:2]]
    if not isinstance(pair[0], UniformQuantizer) or not isinstance(pair[1], UniformQuantizer):
        return "the bias stays float: input or weight is not quantized uniformly"
    if pair[0].axis is not None:
        return "the bias stays float: the input has a scale per channel"
    return accumulator_scale(pair[0], pair[1])


@dataclass(frozen=True)
class QuantizeBias:
    """See the module's text."""

    requires: ClassVar[Stage] = Stage.FROZEN
    ensures: ClassVar[Stage] = Stage.FROZEN

    @torch.no_grad()
    def run(self, gm: fx.GraphModule) -> PassResult:
        """Rounds every bias that an integer kernel would add."""
        changed, skips = 0, []
        for node in list(gm.graph.nodes):
            if op_kind(node) not in (OpKind.LINEAR, OpKind.CONV) or len(node.args) < 3:
                continue
            bias = constant(gm, node.args[2])
            if bias is None:
                continue
            unit = _unit(gm, node)
            if isinstance(unit, str):
                skips.append(Skip(node.name, unit))
                continue
            codes = torch.round(bias.double() / unit.double())
            if bool((codes.abs() >= INT32_MAX).any()):
                skips.append(Skip(node.name, "the bias stays float: it overflows int32"))
                continue
            rounded = (codes * unit.double()).to(bias.dtype)
            if torch.equal(rounded, bias):
                continue
            with gm.graph.inserting_before(node):
                new = add_constant(gm, rounded, f"{node.name}_bias", like=node)
            node.update_arg(2, new)
            changed += 1
        gm.graph.eliminate_dead_code()
        return PassResult(changed, tuple(skips))

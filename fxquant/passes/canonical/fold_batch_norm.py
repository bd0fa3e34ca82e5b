"""Folds batch norm into the linear or convolution before it.

Before: ``y = (W x + b - mean) / sqrt(var + eps) * gamma + beta``
After:  ``y = (r W) x + (b - mean) r + beta`` with ``r = gamma / sqrt(var + eps)``
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from fxquant.config.vocabulary import OpKind, Stage
from fxquant.graph.dialect import aten, op_kind
from fxquant.graph.nodes import constant, data_users, operand
from fxquant.graph.products import Product
from fxquant.graph.rewrite import add_constant
from fxquant.passes.base import PassResult, Refusal, skipped

# Operator -> position of eps; both begin (input, weight, bias, mean, var).
_NORMS: dict[Any, int] = {
    aten.batch_norm.default: 7,
    aten._native_batch_norm_legit_no_training.default: 6,
}
_FLATTEN = {aten.reshape.default, aten.flatten.using_ints}


def _producer(norm: fx.Node, channels: int) -> fx.Node | Refusal:
    """The linear or convolution to fold ``norm`` into, or the reason why the norm stays."""
    node = operand(norm, 0)
    flattened = node.target in _FLATTEN
    if flattened:
        # LeViT flattens (B, N, C) to (B * N, C) for BatchNorm1d: channels stay last.
        if node.meta["val"].ndim != 2 or len(data_users(node)) > 1:
            return Refusal("its input is reshaped in a way that may mix channels")
        node = operand(node, 0)
        if node.meta["val"].shape[-1] != channels:
            return Refusal("its input is reshaped in a way that mixes channels")
    kind = op_kind(node)
    if kind not in (OpKind.LINEAR, OpKind.CONV):
        return Refusal(f"it follows {node.name}, which is not a linear or convolution")
    if kind is OpKind.LINEAR and not flattened and node.meta["val"].ndim != 2:
        return Refusal("it normalises another axis than the linear's output channels")
    if kind is OpKind.CONV and flattened:
        return Refusal("its input is reshaped in a way that mixes channels")
    if len(data_users(node)) > 1:
        return Refusal(f"{node.name} feeds other operations too")
    return node


def _fold(gm: fx.GraphModule, norm: fx.Node, node: fx.Node) -> bool:
    """Folds into weight and bias of ``node``; False where a parameter is not a constant."""
    gamma, beta, mean, var = (constant(gm, norm.args[i]) for i in range(1, 5))
    product = Product(gm, node)
    if not product.has_constant_weight or product.has_computed_bias or mean is None or var is None:
        return False
    weight, bias = product.weight, product.bias
    ratio = torch.rsqrt(var + float(norm.args[_NORMS[norm.target]]))  # type: ignore[arg-type]
    ratio = ratio if gamma is None else ratio * gamma
    new_weight = weight * ratio.reshape(-1, *[1] * (weight.ndim - 1))
    shift: Tensor = (-mean if bias is None else bias - mean) * ratio
    new_bias = shift if beta is None else shift + beta
    with gm.graph.inserting_before(node):
        weight_node = add_constant(gm, new_weight, f"{node.name}_weight", like=node)
        bias_node = add_constant(gm, new_bias, f"{node.name}_bias", like=node)
    node.args = (node.args[0], weight_node, bias_node, *node.args[3:])
    return True


@dataclass(frozen=True)
class FoldBatchNorm:
    """Folds batch norm into the linear or convolution before it."""

    requires: ClassVar[Stage] = Stage.FLOAT
    ensures: ClassVar[Stage] = Stage.FLOAT

    @torch.no_grad()
    def run(self, gm: fx.GraphModule) -> PassResult:
        """Folds where the fold is exact."""
        changed, notes = 0, []
        for norm in [n for n in gm.graph.nodes if n.target in _NORMS]:
            mean = constant(gm, norm.args[3])
            node = _producer(norm, -1 if mean is None else mean.numel())
            if isinstance(node, Refusal):
                notes.append(skipped(norm.name, f"batch norm stays: {node}"))
            elif not _fold(gm, norm, node):
                notes.append(skipped(norm.name, "batch norm stays: a parameter is not a constant"))
            else:
                outputs = [norm]
                if norm.target is not aten.batch_norm.default:
                    outputs = [user for user in norm.users if user.args[1] == 0]
                for output in outputs:
                    output.replace_all_uses_with(operand(norm, 0))
                changed += 1
        gm.graph.eliminate_dead_code()
        return PassResult(changed, tuple(notes))

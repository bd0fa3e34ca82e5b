"""Takes the mean error that rounded weights make out of the bias (arXiv 2111.12293, section 5.3).

Before: ``y^ = linear(q(x), q(W), b)``
After:  ``y^ = linear(q(x), q(W), b')`` with ``b' = b - (q(W) - W) E[q(x)]``

The mean is taken over the sampled rows. A product without a bias gets one. A corrected bias is
marked in its node's ``meta``, and not corrected again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, fx

from fxquant.config.vocabulary import OpKind, Stage
from fxquant.graph.dialect import op_kind
from fxquant.graph.nodes import constant, get_parameter, operand, submodule
from fxquant.graph.rewrite import set_bias
from fxquant.passes.base import BIAS_CORRECTED, PassResult, skipped
from fxquant.quantizers import Quantizer, UniformQuantizer
from fxquant.search.product_loss import ProductSample


@dataclass(frozen=True)
class CorrectBias:
    """See the module's text.

    Attributes:
        samples: rows of each product by node name (``calibration.observe``).
    """

    samples: Mapping[str, ProductSample] = field(repr=False)
    requires: ClassVar[Stage] = Stage.FROZEN
    ensures: ClassVar[Stage] = Stage.FROZEN

    @torch.no_grad()
    def run(self, gm: fx.GraphModule) -> PassResult:
        """Corrects every bias behind a quantized weight."""
        changed, notes = 0, []
        for node in list(gm.graph.nodes):
            if op_kind(node) not in (OpKind.LINEAR, OpKind.CONV) or BIAS_CORRECTED in node.meta:
                continue
            error = self._mean_error(gm, node)
            if isinstance(error, str):
                notes.append(skipped(node.name, error))
            elif bool(error.any()):
                bias = constant(gm, node.args[2]) if len(node.args) > 2 else None
                set_bias(gm, node, -error if bias is None else bias - error)
                node.meta[BIAS_CORRECTED] = True
                changed += 1
        return PassResult(changed, tuple(notes))

    def _mean_error(self, gm: fx.GraphModule, node: fx.Node) -> Tensor | str:
        """``(q(W) - W) E[q(x)]`` of shape ``(N,)``, or why it is not known."""
        coder = submodule(gm, operand(node, 1))
        if not isinstance(coder, Quantizer):
            return "the bias is not corrected: the weight is float"
        sample = self.samples.get(node.name)
        if sample is None:
            return "the bias is not corrected: no rows of the product were sampled"
        if len(node.args) > 2 and node.args[2] is not None and constant(gm, node.args[2]) is None:
            return "the bias is not corrected: it is computed at run time"
        weight = get_parameter(gm, operand(operand(node, 1), 0))
        rounding = (coder(weight) - weight).flatten(1)
        groups = sample.heads
        rows = self._quantized_input(gm, node, sample)[0]  # (groups, n, K)
        counts = rows.new_ones(rows.shape[1]) if sample.counts is None else sample.counts
        mean = torch.einsum("gnk,n->gk", rows, counts / counts.sum())
        by_group = torch.unflatten(rounding, 0, (groups, -1))
        return torch.einsum("gnk,gk->gn", by_group, mean).flatten()

    @staticmethod
    def _quantized_input(gm: fx.GraphModule, node: fx.Node, sample: ProductSample) -> Tensor:
        quantizer = submodule(gm, operand(node, 0))
        per_channel = isinstance(quantizer, UniformQuantizer) and quantizer.axis not in (None, -1)
        if not isinstance(quantizer, Quantizer) or per_channel:
            return sample.lhs
        quantized: Tensor = quantizer(sample.lhs)
        return quantized

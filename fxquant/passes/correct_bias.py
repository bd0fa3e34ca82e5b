"""Corrects biases for the mean error of rounded weights (arXiv 2111.12293, section 5.3).

Before: ``y^ = linear(q(x), q(W), b)``
After:  ``y^ = linear(q(x), q(W), b')`` with ``b' = b - (q(W) - W) E[q(x)]``

The mean is over the sampled rows. A product without a bias gets a bias. A corrected bias is marked
in its node's ``meta``, and is not corrected again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, fx

from fxquant.config.vocabulary import Stage
from fxquant.graph.meta import BIAS_CORRECTED
from fxquant.graph.products import Product, weighted_products
from fxquant.graph.rewrite import set_bias
from fxquant.passes.base import PassResult, Refusal, skipped
from fxquant.quantizers import Quantizer
from fxquant.search.product_loss import ProductSample


@dataclass(frozen=True)
class CorrectBias:
    """Subtracts the mean output error of each quantized weight from the bias.

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
        for product in weighted_products(gm):
            node = product.node
            if BIAS_CORRECTED.get(node):
                continue
            error = self._mean_error(product)
            if isinstance(error, Refusal):
                notes.append(skipped(node.name, error.reason))
            elif bool(error.any()):
                bias = product.bias
                set_bias(gm, node, -error if bias is None else bias - error)
                BIAS_CORRECTED.set(node, True)
                changed += 1
        return PassResult(changed, tuple(notes))

    def _mean_error(self, product: Product) -> Tensor | Refusal:
        """``(q(W) - W) E[q(x)]`` of shape ``(N,)``, or the reason why it is not known."""
        quantizer = product.weight_quantizer
        if quantizer is None:
            return Refusal("the bias is not corrected: the weight is float")
        sample = self.samples.get(product.node.name)
        if sample is None:
            return Refusal("the bias is not corrected: no rows of the product were sampled")
        if product.has_computed_bias:
            return Refusal("the bias is not corrected: it is computed at run time")
        weight = product.weight
        rounding = (quantizer(weight) - weight).flatten(1)
        groups = sample.heads
        rows = _quantized_input(product.input_quantizer, sample)[0]  # (groups, n, K)
        counts = rows.new_ones(rows.shape[1]) if sample.counts is None else sample.counts
        mean = torch.einsum("gnk,n->gk", rows, counts / counts.sum())
        by_group = torch.unflatten(rounding, 0, (groups, -1))
        return torch.einsum("gnk,gk->gn", by_group, mean).flatten()


def _quantized_input(quantizer: Quantizer | None, sample: ProductSample) -> Tensor:
    """Sampled rows, quantized as the product reads them.

    Samples have no axis for scales per channel: rows of an input with such scales stay float.
    """
    if quantizer is None or quantizer.scale_axis not in (None, -1):
        return sample.lhs
    quantized: Tensor = quantizer(sample.lhs)
    return quantized

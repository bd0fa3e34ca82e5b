"""Rounds biases to the grid of the integer accumulator.

Before: ``linear(q(x), q(W), b)``
After:  ``linear(q(x), q(W), b')`` with ``b' = round(b / (s_x s_w)) s_x s_w``

An integer kernel adds the bias to its int32 accumulator, whose unit is the product of the two
scales (the fine scale of a twin quantizer), and the simulation does the same. A bias changes by at
most half such a unit. Where the bias would overflow int32, the weight's scale is widened until the
bias fits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from fxquant.config.vocabulary import Stage
from fxquant.graph.products import Product, weighted_products
from fxquant.graph.rewrite import set_bias
from fxquant.passes.base import Note, PassResult, Refusal, skipped
from fxquant.quantizers import Quantizer, UniformQuantizer, accumulator_scale
from fxquant.quantizers.ops import broadcast

_Site = tuple[Product, Tensor, Quantizer, UniformQuantizer]
# Largest bias code: the sum of the accumulator's products and such a bias still fits int32.
_LARGEST_BIAS_CODE = 2**30


def _pair(product: Product) -> tuple[Quantizer, UniformQuantizer] | Refusal:
    """Quantizers of input and weight, or the reason why there is no integer accumulator."""
    x, w = product.input_quantizer, product.weight_quantizer
    if x is None or not isinstance(w, UniformQuantizer):
        return Refusal("the bias stays float: input or weight is not quantized uniformly")
    if x.accumulator_unit is None:
        return Refusal("the bias stays float: input or weight is not quantized uniformly")
    if x.scale_axis is not None:
        return Refusal("the bias stays float: the input has a scale per channel")
    return x, w


def _make_room(bias: Tensor, x: Quantizer, w: UniformQuantizer, weight: Tensor) -> None:
    """Widens the scale of channels whose weights are so small that their bias does not fit.

    Half a step of the wider scale changes the output by at most ``K 2^-23`` of the bias, which is
    float32's own rounding. Trained models have such channels where a batch norm's gamma decayed to
    almost zero. A channel of zeros may have any scale: it gets the least scale that its bias fits.
    """
    assert x.accumulator_unit is not None
    least = bias.abs() / (x.accumulator_unit * _LARGEST_BIAS_CODE)
    empty = (w.quantize(weight) == broadcast(w.zero_point, weight.ndim, w.axis)).flatten(1).all(1)
    if w.axis is None:
        least, empty = least.max(), empty.all()
    scale = torch.where(empty & (least > 0), least, torch.maximum(w.scale, least))
    w.scale.copy_(w.least_scale(scale))


@dataclass(frozen=True)
class QuantizeBias:
    """Rounds the biases of quantized linears and convolutions to whole accumulator units."""

    requires: ClassVar[Stage] = Stage.FROZEN
    ensures: ClassVar[Stage] = Stage.FROZEN

    @torch.no_grad()
    def run(self, gm: fx.GraphModule) -> PassResult:
        """Rounds every bias that an integer kernel would add."""
        notes: list[Note] = []
        sites = list(self._sites(gm, notes))
        for product, bias, x, w in sites:
            _make_room(bias, x, w, product.weight)
        changed = 0
        for product, bias, x, w in sites:
            unit = accumulator_scale(x, w).double()
            rounded = (torch.round(bias.double() / unit) * unit).to(bias.dtype)
            if torch.equal(rounded, bias):
                continue
            set_bias(gm, product.node, rounded)
            changed += 1
        return PassResult(changed, tuple(notes))

    @staticmethod
    def _sites(gm: fx.GraphModule, notes: list[Note]) -> Iterator[_Site]:
        for product in weighted_products(gm):
            bias = product.bias
            if bias is None:
                continue
            pair = _pair(product)
            if isinstance(pair, Refusal):
                notes.append(skipped(product.node.name, pair.reason))
            else:
                yield product, bias, *pair

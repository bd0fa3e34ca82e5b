"""Weights that make up for quantization in closed form.

Before: ``y^ = linear(q(x^), q(W), b)`` with ``x^`` from the quantized layers before it
After:  ``y^ = linear(q(x^), q(W'), b')``, W' first the ridge solution that brings ``W' q(x^)``
        nearest to the float ``y`` (arXiv 2407.06794), then rounded column by column, each column
        making up for those before it (arXiv 2210.17323); ``b' = E[y] - q(W') E[q(x^)]``; W' = W
        where that lowers no error

Layer after layer, so that each sees what the compensated ones before it give. The mean is taken out
of both sides, and given back by the bias; a product without one gets one. Few images have too few
rows for all columns of a wide layer; where the options ask for it, others are made of them. Gains
are the mean squared error of the product's output over that with the weight as it was, both with
the best bias, on the images that the weight is fitted to.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from fxquant.config.recovery import Compensation
from fxquant.config.vocabulary import OpKind, Stage
from fxquant.graph.blocks import find_blocks, waves
from fxquant.graph.conv_patches import patches
from fxquant.graph.dialect import op_kind
from fxquant.graph.macs import MacCounter
from fxquant.graph.meta import COMPENSATED
from fxquant.graph.nodes import arguments
from fxquant.graph.products import Product, weighted_products
from fxquant.graph.rewrite import replace_constant, set_bias
from fxquant.passes.base import Gain, PassResult, Skip
from fxquant.quantizers import UniformQuantizer
from fxquant.reconstruction.augment import made_in_folds
from fxquant.reconstruction.blockwise import BlockContext, BlockwiseRunner, chunks
from fxquant.search.gptq import Moments, ridge_update, round_weight

_MEASURE = "squared output error of the weights rounded to nearest"
_ONE_IMAGE = "no ridge: it is chosen by images left out, so it takes two calibration images or more"
_OVERFLOW = "not compensated: squares of what it reads or gives are beyond float32"
# Multiplications that running the images through the network may take where some are made.
_WORK = 2e11
# Parts of the images of which each is once left out when the ridge is chosen.
_FOLDS = 4

# Some images that run at a time, and the fold that they are in.
_Part = tuple[slice, int]


@dataclass(frozen=True)
class Compensate:
    """See the module's text.

    Attributes:
        sides: the float network and the images.
        options: what is done.
    """

    sides: BlockwiseRunner = field(repr=False)
    options: Compensation
    requires: ClassVar[Stage] = Stage.FROZEN
    ensures: ClassVar[Stage] = Stage.FROZEN

    @torch.no_grad()
    def run(self, gm: fx.GraphModule) -> PassResult:
        """Compensates every linear and convolution that has a quantized weight of its own."""
        gains: list[Gain] = []
        skips: list[Skip] = []
        wanted: dict[fx.Node, UniformQuantizer] = {}
        for product in weighted_products(gm):
            if not COMPENSATED.get(product.node):
                quantizer = _weight_quantizer(product)
                if isinstance(quantizer, str):
                    skips.append(Skip(product.node.name, quantizer))
                else:
                    wanted[product.node] = quantizer
        if wanted:
            blocks, memory = find_blocks(gm), self.options.memory_bytes
            sides, parts = _arranged(self.sides, gm, self.options)
            if self.options.ridge and len(self.sides.images) < 2:
                skips.append(Skip("network", _ONE_IMAGE))
            for station in sides.walk(gm, blocks, "compensate", memory):
                for wave in waves(station.block.nodes, set(wanted)):
                    for node, moments in _collect(station, wave, parts).items():
                        if moments.whole.finite:
                            gains.append(_improve(gm, node, wanted[node], moments, self.options))
                        else:
                            skips.append(Skip(node.name, _OVERFLOW))
        return PassResult(len(gains), tuple(skips), tuple(gains))


def _arranged(
    sides: BlockwiseRunner, gm: fx.GraphModule, options: Compensation
) -> tuple[BlockwiseRunner, list[_Part]]:
    """On as many images as are asked for, some made of those given; and those in parts."""
    images, folds = sides.images, _FOLDS if options.ridge else 1
    missing = min(options.images, int(_WORK // max(MacCounter(gm).total, 1))) - len(images)
    found = list(chunks(len(images)))
    if missing <= 0 and len(found) >= folds:
        return sides, [(chunk, i % folds) for i, chunk in enumerate(found)]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        groups = made_in_folds(images, max(missing, 0), min(folds, len(images)))
    parts: list[_Part] = []
    start = 0
    for fold, group in enumerate(groups):
        own = chunks(len(group))
        parts += [(slice(start + chunk.start, start + chunk.stop), fold) for chunk in own]
        start += len(group)
    return sides.on(torch.cat(groups)), parts


def _weight_quantizer(product: Product) -> UniformQuantizer | str:
    """The quantizer of a product's weight, or why the weight is not compensated."""
    quantizer = product.weight_quantizer
    if not isinstance(quantizer, UniformQuantizer):
        return "not compensated: the weight is not quantized uniformly"
    unshared = product.has_constant_weight and _weight_readers(product) == 1
    if not unshared or len(product.rhs.users) > 1:
        return "not compensated: several products share the weight"
    if product.has_computed_bias:
        return "not compensated: its bias is computed at run time"
    if product.kind is OpKind.CONV and int(arguments(product.node)["groups"]) > 1:
        return "not compensated: a grouped convolution has few weights to make up with"
    return quantizer


def _weight_readers(product: Product) -> int:
    """Number of nodes that read a product's weight, by whatever get_attr node."""
    name, nodes = product.weight_node.target, product.gm.graph.nodes
    return sum(len(node.users) for node in nodes if node.op == "get_attr" and node.target == name)


class _Statistics:
    """Moments of one product, of all images and, where the ridge is chosen by them, of parts."""

    def __init__(self, node: fx.Node, weight: Tensor, folds: int) -> None:
        self._node, self._weight = node, weight
        size = weight[0].numel(), len(weight), weight.device
        self.whole = Moments(*size)
        self.parts = [Moments(*size) for _ in range(folds)]
        self._target: Tensor | None = None

    def see_exact(self, args: tuple[Any, ...], result: Tensor) -> None:
        """Takes what the float product gives."""
        self._target = result

    def see_quantized(self, fold: int) -> Callable[[tuple[Any, ...], Any], None]:
        """Takes what the quantized product reads, of images of one fold."""

        def take(args: tuple[Any, ...], _: Any) -> None:
            assert self._target is not None
            if op_kind(self._node) is OpKind.CONV:
                x = patches(args[0], self._node, self._weight.shape).flatten(-self._weight.ndim + 1)
                y = self._target.movedim(1, -1)
            else:
                x, y = args[0], self._target
            rows = x.flatten(0, -2).float(), y.flatten(0, -2).float()
            self.whole.add(*rows)
            if self.parts:
                self.parts[fold].add(*rows)

        return take


def _collect(
    station: BlockContext, wave: list[fx.Node], parts: list[_Part]
) -> dict[fx.Node, _Statistics]:
    """Statistics of products none of which reads another's output."""
    folds = len({fold for _, fold in parts})
    gm = station.student.graph_module
    found = {
        node: _Statistics(node, Product(gm, node).weight, folds if folds > 1 else 0)
        for node in wave
    }
    for chunk, fold in parts:
        station.teacher.run_block(
            station.block,
            station.exact.get(chunk, station.device),
            watch={node.name: its.see_exact for node, its in found.items()},
            until=wave[-1].name,
        )
        station.student.run_block(
            station.block,
            station.given.get(chunk, station.device),
            watch={node.name: its.see_quantized(fold) for node, its in found.items()},
            until=wave[-1].name,
        )
    return found


def _improve(
    gm: fx.GraphModule,
    node: fx.Node,
    coder: UniformQuantizer,
    moments: _Statistics,
    options: Compensation,
) -> Gain:
    """Gives a product its new weight and bias."""
    product = Product(gm, node)
    weight = product.weight
    flat, whole = weight.detach().flatten(1), moments.whole
    nearest, choice, wanted = coder(flat), [], flat.double()
    if options.ridge and moments.parts:
        wanted, left = ridge_update(flat, moments.parts, whole)
        if left < 1:
            choice.append(f"ridge, {left:.2f} of the error on images left out")
    latent = wanted.float()
    if options.gptq:
        rounded = round_weight(wanted, whole.covariance, coder, options.damping)
        latent, values = rounded.latent.float(), rounded.values.float()
        choice.append("rounding by columns")
    else:
        values = coder(latent)
    before, after = whole.error(nearest), whole.error(values)
    if after > before:
        latent, values, after, choice = flat, nearest, before, []
    latent = latent.reshape(weight.shape)
    replace_constant(gm, product.rhs, product.weight_node, latent, f"{node.name}_weight")
    bias = whole.mean_y - values.double() @ whole.mean_x
    set_bias(gm, node, bias.to(weight.dtype))
    COMPENSATED.set(node, True)
    ratio = after / before if before > 0 else 1.0
    return Gain(node.name, ", ".join(choice) or "bias", _MEASURE, ratio)

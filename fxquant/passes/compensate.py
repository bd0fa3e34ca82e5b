"""Compensates weights for quantization errors in closed form.

Before: ``y^ = linear(q(x^), q(W), b)`` with ``x^`` from the quantized layers before it
After:  ``y^ = linear(q(x^), q(W'), b')``, W' first the ridge solution that brings ``W' q(x^)``
        nearest to the float ``y`` (arXiv 2407.06794), then rounded column by column, each column
        compensating the rounding errors of the columns before it (arXiv 2210.17323);
        ``b' = E[y] - q(W') E[q(x^)]``; W' = W where W' does not lower the error

Layers are compensated in order, each on the outputs of the compensated layers before it. Inputs and
outputs are centred, and the bias adds the mean again; a product without a bias gets a bias. Few
images have too few rows for all columns of a wide layer; where the options ask for more images, the
calibration images are augmented. A comparison is the mean squared error of the product's output
over that with the weight rounded to nearest, both with the best bias, on the images that the weight
is fitted to.
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
from fxquant.passes.base import Comparison, Note, PassResult, Refusal, skipped
from fxquant.quantizers import UniformQuantizer
from fxquant.reconstruction.augment import made_in_folds
from fxquant.reconstruction.blockwise import BlockContext, BlockwiseRunner, chunks
from fxquant.reconstruction.image_split import ImageSplit
from fxquant.search.gptq import Moments, ridge_update, round_weight

_MEASURE = "squared output error of the weights rounded to nearest"
_ONE_IMAGE = (
    "no ridge: it is chosen by cross-validation, which needs two calibration images or more"
)
_OVERFLOW = "not compensated: squares of its inputs or outputs overflow float32"
# Largest number of multiplications of running all images, augmented ones included.
_MAX_MACS = 2e11
# Number of folds of the images; each is left out once when the ridge is chosen.
_FOLDS = 4

# Images that run at a time, and the index of their fold.
_Chunk = tuple[slice, int]


@dataclass(frozen=True)
class Compensate:
    """Compensates every linear and convolution whose uniformly quantized weight has one reader.

    Attributes:
        runner: the float network and the images.
        options: ridge, GPTQ, and the least number of images.
        split: weights are fitted to its training images; None fits weights to all images.
    """

    runner: BlockwiseRunner = field(repr=False)
    options: Compensation
    split: ImageSplit | None = field(default=None, repr=False)
    requires: ClassVar[Stage] = Stage.FROZEN
    ensures: ClassVar[Stage] = Stage.FROZEN

    @torch.no_grad()
    def run(self, gm: fx.GraphModule) -> PassResult:
        """Compensates the products block by block, in graph order."""
        comparisons: list[Comparison] = []
        quantizers, notes = _weight_quantizers(gm)
        if not quantizers:
            return PassResult(0, tuple(notes))
        runner = self.runner
        if self.split is not None:
            runner = runner.on(runner.images[self.split.training])
        if self.options.ridge and len(runner.images) < 2:
            notes.append(skipped("network", _ONE_IMAGE))
        blocks, memory = find_blocks(gm), self.options.memory_bytes
        runner, chunks_in_folds = _in_folds(runner, gm, self.options)
        for context in runner.walk(gm, blocks, "compensate", memory):
            for wave in waves(context.block.nodes, set(quantizers)):
                for node, moments in _collect(context, wave, chunks_in_folds).items():
                    if moments.total.finite:
                        comparisons.append(
                            _improve(gm, node, quantizers[node], moments, self.options)
                        )
                    else:
                        notes.append(skipped(node.name, _OVERFLOW))
        return PassResult(len(comparisons), tuple(notes), tuple(comparisons))


def _in_folds(
    runner: BlockwiseRunner, gm: fx.GraphModule, options: Compensation
) -> tuple[BlockwiseRunner, list[_Chunk]]:
    """The runner on as many images as the options ask for, augmented ones included, and its chunks.

    Images are augmented within each fold: an image left out has no augmented copy in another fold.
    """
    images, folds = runner.images, _FOLDS if options.ridge else 1
    affordable = int(_MAX_MACS // max(MacCounter(gm).total, 1))
    missing = min(options.images, affordable) - len(images)
    all_chunks = list(chunks(len(images)))
    if missing <= 0 and len(all_chunks) >= folds:
        return runner, [(chunk, i % folds) for i, chunk in enumerate(all_chunks)]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        groups = made_in_folds(images, max(missing, 0), min(folds, len(images)))
    chunks_in_folds: list[_Chunk] = []
    start = 0
    for fold, group in enumerate(groups):
        chunks_in_folds += [
            (slice(start + chunk.start, start + chunk.stop), fold) for chunk in chunks(len(group))
        ]
        start += len(group)
    return runner.on(torch.cat(groups)), chunks_in_folds


def _weight_quantizers(
    gm: fx.GraphModule,
) -> tuple[dict[fx.Node, UniformQuantizer], list[Note]]:
    """The weight quantizers of the products to compensate, and notes on the other products."""
    quantizers: dict[fx.Node, UniformQuantizer] = {}
    notes: list[Note] = []
    for product in weighted_products(gm):
        if not COMPENSATED.get(product.node):
            quantizer = _weight_quantizer(product)
            if isinstance(quantizer, Refusal):
                reason = f"not compensated: {quantizer.reason}"
                notes.append(skipped(product.node.name, reason))
            else:
                quantizers[product.node] = quantizer
    return quantizers, notes


def _weight_quantizer(product: Product) -> UniformQuantizer | Refusal:
    """The quantizer of a product's weight, or the reason why the weight is not compensated."""
    quantizer = product.weight_quantizer
    if not isinstance(quantizer, UniformQuantizer):
        return Refusal("the weight is not quantized uniformly")
    unshared = product.has_constant_weight and _weight_readers(product) == 1
    if not unshared or len(product.rhs.users) > 1:
        return Refusal("several products share the weight")
    if product.has_computed_bias:
        return Refusal("its bias is computed at run time")
    if product.kind is OpKind.CONV and int(arguments(product.node)["groups"]) > 1:
        return Refusal("a grouped convolution has few weights to compensate with")
    return quantizer


def _weight_readers(product: Product) -> int:
    """Number of nodes that read a product's weight, through any get_attr node."""
    name, nodes = product.weight_node.target, product.gm.graph.nodes
    return sum(len(node.users) for node in nodes if node.op == "get_attr" and node.target == name)


class _Statistics:
    """Moments of one product: of all images and, where folds choose the ridge, of each fold."""

    def __init__(self, node: fx.Node, weight: Tensor, folds: int) -> None:
        self._node, self._weight = node, weight
        size = weight[0].numel(), len(weight), weight.device
        self.total = Moments(*size)
        self.folds = [Moments(*size) for _ in range(folds)]
        self._float_output: Tensor | None = None

    def see_float(self, args: tuple[Any, ...], result: Tensor) -> None:
        """Keeps the output of the float product."""
        self._float_output = result

    def see_quantized(self, fold: int) -> Callable[[tuple[Any, ...], Any], None]:
        """A function that adds the quantized product's inputs, of images of one fold."""

        def see(args: tuple[Any, ...], _: Any) -> None:
            assert self._float_output is not None
            if op_kind(self._node) is OpKind.CONV:
                x = patches(args[0], self._node, self._weight.shape).flatten(-self._weight.ndim + 1)
                y = self._float_output.movedim(1, -1)
            else:
                x, y = args[0], self._float_output
            rows = x.flatten(0, -2).float(), y.flatten(0, -2).float()
            self.total.add(*rows)
            if self.folds:
                self.folds[fold].add(*rows)

        return see


def _collect(
    context: BlockContext, wave: list[fx.Node], chunks_in_folds: list[_Chunk]
) -> dict[fx.Node, _Statistics]:
    """Statistics of products that do not depend on each other's outputs."""
    folds = len({fold for _, fold in chunks_in_folds})
    gm = context.student.graph_module
    statistics = {
        node: _Statistics(node, Product(gm, node).weight, folds if folds > 1 else 0)
        for node in wave
    }
    for chunk, fold in chunks_in_folds:
        context.teacher.run_block(
            context.block,
            context.float_inputs.get(chunk, context.device),
            watch={node.name: item.see_float for node, item in statistics.items()},
            until=wave[-1].name,
        )
        context.student.run_block(
            context.block,
            context.quantized_inputs.get(chunk, context.device),
            watch={node.name: item.see_quantized(fold) for node, item in statistics.items()},
            until=wave[-1].name,
        )
    return statistics


def _improve(
    gm: fx.GraphModule,
    node: fx.Node,
    quantizer: UniformQuantizer,
    moments: _Statistics,
    options: Compensation,
) -> Comparison:
    """Replaces weight and bias of a product where that lowers the error."""
    product = Product(gm, node)
    weight = product.weight
    flat, total = weight.detach().flatten(1), moments.total
    nearest, choice, target = quantizer(flat), [], flat.double()
    if options.ridge and moments.folds:
        target, error_ratio = ridge_update(flat, moments.folds, total)
        if error_ratio < 1:
            choice.append(f"ridge, {error_ratio:.2f} of the error on images left out")
    latent = target.float()
    if options.gptq:
        rounded = round_weight(target, total.covariance, quantizer, options.damping)
        latent, values = rounded.latent.float(), rounded.values.float()
        choice.append("rounding by columns")
    else:
        values = quantizer(latent)
    before, after = total.error(nearest), total.error(values)
    if after > before:
        latent, values, after, choice = flat, nearest, before, []
    latent = latent.reshape(weight.shape)
    replace_constant(gm, product.rhs, product.weight_node, latent, f"{node.name}_weight")
    bias = total.mean_y - values.double() @ total.mean_x
    set_bias(gm, node, bias.to(weight.dtype))
    COMPENSATED.set(node, True)
    ratio = after / before if before > 0 else 1.0
    return Comparison(node.name, ", ".join(choice) or "bias", _MEASURE, ratio)

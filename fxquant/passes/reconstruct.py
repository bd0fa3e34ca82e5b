"""Trains blocks towards the float ones (BRECQ, arXiv 2102.05426; AIQViT, arXiv 2502.04628).

Before: a block ``B_q`` of quantized products, scales fixed
After:  the same block, with the roundings, scales, biases or low-rank factors that minimize
        ``|B_q(x^) - B(x)|``, x^ from the blocks reconstructed before it

Low-rank factors are added to the weight before it is rounded: the graph has no branch for them
afterwards. A block whose loss does not fall is not changed. With the scope ``network`` all blocks
are trained as one towards the outputs of the float network, also on images augmented from the
calibration images where the options ask for augmentation. A comparison is the loss after training
over the loss before, on validation images that were not trained on; where no images are held out,
on images augmented from the training images, or on the training images. For each low-rank change, a
comparison is the ratio of output errors of the product that reads the weight, on the validation
images themselves.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from fxquant.config.recovery import Reconstruction, Scope
from fxquant.config.vocabulary import Stage
from fxquant.graph.blocks import find_blocks, whole_network
from fxquant.graph.edges import quantized_edges
from fxquant.graph.macs import MacCounter
from fxquant.graph.meta import RECONSTRUCTED
from fxquant.graph.nodes import operand
from fxquant.graph.rewrite import replace_constant, set_bias
from fxquant.passes.base import Comparison, PassResult, skipped
from fxquant.reconstruction.augment import augmented_copies
from fxquant.reconstruction.blockwise import CHUNK, BlockContext, BlockwiseRunner
from fxquant.reconstruction.checkpoint import Checkpoints
from fxquant.reconstruction.image_split import ImageSplit
from fxquant.reconstruction.losses import criterion, measure
from fxquant.reconstruction.trained_block import Changes, TrainedBlock, TrainingResult, refusal
from fxquant.reconstruction.training import train_block

_MEASURE = "squared output error before"
# Training is not started where ``max_macs`` leaves fewer steps than this: learning rates fall to
# zero along a cosine, and a few steps change little.
_MIN_STEPS = 20


@dataclass(frozen=True)
class Reconstruct:
    """Trains every block, or all blocks as one.

    Attributes:
        runner: the float network and the images.
        options: the trained parameters, and the settings of the training.
        split: images to train on, and validation images, whose loss decides.
        cache: folder for the trained blocks; an interrupted run with the same folder continues
            where it stopped. None keeps nothing.
    """

    runner: BlockwiseRunner = field(repr=False)
    options: Reconstruction
    split: ImageSplit = field(repr=False)
    cache: str | Path | None = None
    requires: ClassVar[Stage] = Stage.FROZEN
    ensures: ClassVar[Stage] = Stage.FROZEN

    def run(self, gm: fx.GraphModule) -> PassResult:
        """Reconstructs every block.

        Raises:
            OutputError: the cache cannot be written.
            FileFormatError: the cache is damaged.
        """
        if RECONSTRUCTED.get(gm):
            return PassResult(0)
        images = max(len(self.runner.images), self.options.images)
        steps = _affordable(gm, self.options, images)
        if steps < min(_MIN_STEPS, self.options.iterations):
            return PassResult(0, (skipped("network", _too_few_steps(steps, self.options, images)),))
        notes = [
            skipped(edge.node.name, reason)
            for edge in quantized_edges(gm)
            if (reason := refusal(gm, edge, self.options)) is not None
        ]
        with tempfile.TemporaryDirectory(prefix="fxquant-") as folder, torch.random.fork_rng():
            runner, split = _with_copies(self.runner, self.split, self.options)
            item = replace(self, runner=runner, split=split)
            blocks = _Blocks(gm, item, steps, Path(folder))
            for number, context in enumerate(blocks.walk()):
                result = blocks.train(number, context)
                if result.changes is None:
                    notes.append(skipped(context.block.name, _why_not_changed(result)))
                else:
                    blocks.write_back(context, result, result.changes)
        RECONSTRUCTED.set(gm, True)
        return PassResult(blocks.changed, tuple(notes), tuple(blocks.comparisons))


class _Blocks:
    """The blocks of a graph under reconstruction.

    Args:
        gm: the quantized graph.
        item: the pass.
        steps: number of training steps of a block.
        folder: folder for measurements that exceed the memory.
    """

    def __init__(self, gm: fx.GraphModule, item: Reconstruct, steps: int, folder: Path) -> None:
        self._gm, self._item = gm, item
        self._options = replace(item.options, iterations=steps)
        self._whole = item.options.scope is Scope.NETWORK
        self._blocks = (whole_network(gm),) if self._whole else find_blocks(gm)
        settings = f"{item.options!r}, validation {item.split.validation.tolist()}"
        cache, images = None if item.cache is None else Path(item.cache), item.runner.images
        self._checkpoints = Checkpoints(cache, gm, images, settings)
        self._measured = measure(item.runner.teacher(), self._blocks, images, item.options, folder)
        self.changed = 0
        self.comparisons: list[Comparison] = []

    def walk(self) -> Iterator[BlockContext]:
        """The blocks, with their progress on stderr where there is more than one."""
        label = None if self._whole else self._label
        return self._item.runner.walk(self._gm, self._blocks, label, self._options.memory_bytes)

    def _label(self) -> str:
        """The label of the progress through the blocks, with the loss ratio of the last one."""
        if not self.comparisons:
            return "reconstruct"
        return f"reconstruct, loss x {self.comparisons[-1].error_ratio:.3f}"

    def train(self, number: int, context: BlockContext) -> TrainingResult:
        """Trains a block, or reads its result from the cache.

        Args:
            number: index of the block.
            context: the data of the block.
        """
        options = replace(self._options, seed=self._options.seed + number)
        torch.manual_seed(options.seed)
        result = self._checkpoints.get(number, context.device)
        if result is None:
            generator = torch.Generator().manual_seed(options.seed)
            block = TrainedBlock(self._gm, context, options, generator).to(context.device)
            loss = criterion(options, self._measured, context)
            state_file = self._checkpoints.state_file(number)
            label = "reconstruct" if self._whole and self._item.runner.progress else None
            split = self._item.split
            result = train_block(block, context, loss, options, split, state_file, label)
        self._checkpoints.put(number, result)
        return result

    def write_back(self, context: BlockContext, result: TrainingResult, changes: Changes) -> None:
        """Writes the trained block into the graph, and compares the block with its old form."""
        ranks, images = _changed_products(self._gm, changes), self._item.split.validation
        before = _output_errors(context, ranks, images)
        apply_changes(self._gm, changes)
        after = _output_errors(context, ranks, images)
        self.comparisons += [
            Comparison(name, f"rank {rank}", _MEASURE, after[name] / max(before[name], 1e-30))
            for name, rank in ranks.items()
        ]
        measure, ratio = f"{self._options.block_loss} loss", result.loss_after / result.loss_before
        choice = str(self._options.weights)
        self.comparisons.append(Comparison(context.block.name, choice, measure, ratio))
        self.changed += 1


def _with_copies(
    runner: BlockwiseRunner, split: ImageSplit, options: Reconstruction
) -> tuple[BlockwiseRunner, ImageSplit]:
    """The runner and the split with as many images as the options ask for, by augmentation."""
    images, missing = runner.images, options.images - len(runner.images)
    if missing <= 0:
        return runner, split
    with torch.random.fork_rng():
        torch.manual_seed(options.seed)
        copies = augmented_copies(images[split.training], missing)
    training = torch.cat((split.training, torch.arange(len(images), options.images)))
    return runner.on(torch.cat((images, copies))), replace(split, training=training)


def _affordable(gm: fx.GraphModule, options: Reconstruction, images: int) -> int:
    """Number of steps within the bound on multiplications."""
    if options.max_macs is None:
        return options.iterations
    # The quantized network forward and, at twice the cost, backward; the float one on new images.
    step = MacCounter(gm).total * min(options.batch, images) * (4 if options.augment else 3)
    return min(options.iterations, int(options.max_macs // max(step, 1)))


def _too_few_steps(steps: int, options: Reconstruction, images: int) -> str:
    return (
        f"not trained: {options.max_macs:g} multiplications allow only {steps} steps of "
        f"{min(options.batch, images)} images, and at least {_MIN_STEPS} are needed; raise "
        "max_macs, or set it to None for all steps"
    )


def _why_not_changed(result: TrainingResult) -> str:
    before = result.loss_before
    reason = "its loss did not fall" if 0 < before < math.inf else f"its loss was {before:g}"
    return f"not changed: {reason}"


def _changed_products(gm: fx.GraphModule, changes: Changes) -> dict[str, int]:
    """Rank of the low-rank change of each product's weight, by name of the product."""
    nodes = {node.name: node for node in gm.graph.nodes}
    return {next(iter(nodes[name].users)).name: rank for name, rank in changes.ranks.items()}


@torch.no_grad()
def _output_errors(
    context: BlockContext, products: Iterable[str], images: Tensor
) -> dict[str, float]:
    """Squared output errors of products, each network run on its own inputs of the block.

    Args:
        context: the block of the products.
        products: names of the products.
        images: indices of the images, ``(n,)``.
    """
    float_results: dict[str, Tensor] = {}
    errors = dict.fromkeys(products, 0.0)

    def keep(name: str, _: Any, result: Tensor) -> None:
        float_results[name] = result

    def compare(name: str, _: Any, result: Tensor) -> None:
        errors[name] += float((result - float_results[name]).double().square().sum())

    for index in torch.split(images, CHUNK) if errors else ():
        for network, store, see in (
            (context.teacher, context.float_inputs, keep),
            (context.student, context.quantized_inputs, compare),
        ):
            watch = {name: partial(see, name) for name in errors}
            network.run_block(context.block, store.get(index, context.device), watch=watch)
    return errors


def apply_changes(gm: fx.GraphModule, changes: Changes) -> None:
    """Writes trained quantizers, weights and biases into the graph."""
    nodes = {node.name: node for node in gm.graph.nodes}
    for name, quantizer in changes.quantizers.items():
        gm.set_submodule(str(nodes[name].target), quantizer)
    for name, weight in changes.weights.items():
        call = nodes[name]
        replace_constant(gm, call, operand(call, 0), weight, f"{name}_trained")
    for name, bias in changes.biases.items():
        set_bias(gm, nodes[name], bias)

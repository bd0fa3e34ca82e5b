"""Trains blocks to give what the float ones give (BRECQ, arXiv 2102.05426; AIQViT, 2502.04628).

Before: a block ``B_q`` of quantized products, scales fixed
After:  the same block, with the roundings, scales, biases or low-rank factors that make
        ``|B_q(x^) - B(x)|`` least, x^ from the blocks reconstructed before it

Low-rank factors are added to the weight before it is rounded, so nothing is left of them in the
graph. A block whose loss does not fall stays as it was. With the scope ``network`` all blocks are
trained as one, to give what the float network gives, on other images made of those given where the
options say so. Gains are losses after over before, of images that were not trained on; where none
are held out, of other images made of them, or of the same. For each low-rank change, they are the
output error of the product that reads the weight, of the same images as they were given.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterable
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
from fxquant.passes.base import Gain, PassResult, Skip
from fxquant.reconstruction.blockwise import CHUNK, BlockContext, BlockwiseRunner
from fxquant.reconstruction.checkpoint import Checkpoints, StateFile
from fxquant.reconstruction.losses import Measured, criterion, measure
from fxquant.reconstruction.trained_block import Changes, TrainedBlock, refusal
from fxquant.reconstruction.training import split, train_block

_MEASURE = "squared output error before"
# A bounded number of steps smaller than this is not begun with: rates fall to zero along a cosine,
# so that so few move little.
_FEWEST = 20


@dataclass(frozen=True)
class Reconstruct:
    """See the module's text.

    Attributes:
        sides: the float network and the images.
        options: what is trained, and how.
        cache: folder for what is trained so far; an interrupted run with the same folder goes on
            where it stopped. None keeps nothing.
    """

    sides: BlockwiseRunner = field(repr=False)
    options: Reconstruction
    cache: Path | None = None
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
        changed, gains = 0, list[Gain]()
        skips = [
            Skip(edge.node.name, reason)
            for edge in quantized_edges(gm)
            if (reason := refusal(gm, edge, self.options)) is not None
        ]
        teacher, images = self.sides.teacher(), self.sides.images
        steps = _affordable(gm, self.options, len(images))
        if steps < min(_FEWEST, self.options.iterations):
            reason = _too_much_work(steps, self.options, len(images))
            return PassResult(0, (Skip("network", reason),))
        kept = Checkpoints(self.cache, gm, images, repr(self.options))
        parts = split(len(images), self.options.held_out, self.options.seed)
        with tempfile.TemporaryDirectory(prefix="fxquant-") as folder, torch.random.fork_rng():
            together = self.options.scope is Scope.NETWORK
            blocks = (whole_network(gm),) if together else find_blocks(gm)
            measured = measure(teacher, blocks, images, self.options, Path(folder))
            shown = "reconstruct" if self.sides.progress and together else None
            walk = self.sides.walk(
                gm,
                blocks,
                None if together else lambda: _label(gains),
                self.options.memory_bytes,
            )
            for number, station in enumerate(walk):
                options = replace(self.options, iterations=steps, seed=self.options.seed + number)
                torch.manual_seed(options.seed)
                done = kept.get(number, station.device)
                changes, before, after = done or self._train(
                    gm, station, options, measured, parts, kept.state_file(number), shown
                )
                kept.put(number, changes, before, after)
                if changes is None:
                    fell = "its loss did not fall"
                    reason = fell if 0 < before < math.inf else f"its loss was {before:g}"
                    skips.append(Skip(station.block.name, f"left as it was: {reason}"))
                    continue
                changed += 1
                readers = _moved_products(gm, changes)
                old = _output_errors(station, readers, parts[0])
                apply_changes(gm, changes)
                new = _output_errors(station, readers, parts[0])
                gains += [
                    Gain(name, f"rank {rank}", _MEASURE, new[name] / max(old[name], 1e-30))
                    for name, rank in readers.items()
                ]
                gains.append(
                    Gain(
                        station.block.name,
                        options.weights,
                        f"{options.block_loss} loss",
                        after / before,
                    )
                )
        RECONSTRUCTED.set(gm, True)
        return PassResult(changed, tuple(skips), tuple(gains))

    @staticmethod
    def _train(
        gm: fx.GraphModule,
        station: BlockContext,
        options: Reconstruction,
        measured: Measured,
        parts: tuple[Tensor, Tensor],
        kept: StateFile | None,
        shown: str | None,
    ) -> tuple[Changes | None, float, float]:
        generator = torch.Generator().manual_seed(options.seed)
        block = TrainedBlock(gm, station, options, generator).to(station.device)
        loss = criterion(options, measured, station)
        return train_block(block, station, loss, options, parts, kept, shown)


def _affordable(gm: fx.GraphModule, options: Reconstruction, images: int) -> int:
    """Number of steps within the bound on work."""
    if options.max_macs is None:
        return options.iterations
    # The quantized network forward and, at twice the work, backward; the float one on new images.
    step = MacCounter(gm).total * min(options.batch, images) * (4 if options.augment else 3)
    return min(options.iterations, int(options.max_macs // max(step, 1)))


def _too_much_work(steps: int, options: Reconstruction, images: int) -> str:
    return (
        f"not trained: {options.max_macs:g} multiplications are no more than {steps} steps of "
        f"{min(options.batch, images)} images, and fewer than {_FEWEST} are not begun with; raise "
        "max_macs, or set it to None for all steps"
    )


def _label(gains: list[Gain]) -> str:
    """Of the progress through the blocks, with the last one's loss."""
    return f"reconstruct, loss x {gains[-1].ratio:.3f}" if gains else "reconstruct"


def _moved_products(gm: fx.GraphModule, changes: Changes) -> dict[str, int]:
    """Rank of the low-rank change of each product's weight, by name of the product."""
    nodes = {node.name: node for node in gm.graph.nodes}
    return {next(iter(nodes[name].users)).name: rank for name, rank in changes.ranks.items()}


@torch.no_grad()
def _output_errors(
    station: BlockContext, products: Iterable[str], images: Tensor
) -> dict[str, float]:
    """Squared error of what some products give, each network with what its own gives before.

    Args:
        station: their block.
        products: their names.
        images: numbers of the images, ``(n,)``.
    """
    exact: dict[str, Tensor] = {}
    errors = dict.fromkeys(products, 0.0)

    def keep(name: str, _: Any, result: Tensor) -> None:
        exact[name] = result

    def compare(name: str, _: Any, result: Tensor) -> None:
        errors[name] += float((result - exact[name]).double().square().sum())

    for index in torch.split(images, CHUNK) if errors else ():
        for runner, shelf, see in (
            (station.teacher, station.exact, keep),
            (station.student, station.given, compare),
        ):
            watch = {name: partial(see, name) for name in errors}
            runner.run_block(station.block, shelf.get(index, station.device), watch=watch)
    return errors


def apply_changes(gm: fx.GraphModule, changes: Changes) -> None:
    """Puts what was trained into the graph."""
    nodes = {node.name: node for node in gm.graph.nodes}
    for name, quantizer in changes.quantizers.items():
        gm.set_submodule(str(nodes[name].target), quantizer)
    for name, weight in changes.weights.items():
        call = nodes[name]
        replace_constant(gm, call, operand(call, 0), weight, f"{name}_trained")
    for name, bias in changes.biases.items():
        set_bias(gm, nodes[name], bias)

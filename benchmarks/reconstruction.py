"""Cost of a training step relative to the float block's forward and backward pass.

    python benchmarks/reconstruction.py --model deit_small_patch16_224

The block is the one in the middle of the network, with 4-bit weights and activations and squared
error. The cost is the median over the rounds of the time of one step (draw, forward, backward,
update) over the time of the float block's forward and backward pass for equally many images, each
with gradients for inputs and weights. Both are timed in turns in the same run; weights are random,
except for the shipped models.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import timm
import torch
from accuracy import positive
from rich.console import Console
from rich.table import Table
from torch import Tensor, fx

import fxquant
from fxquant import Reconstruction, policies
from fxquant.config.recovery import BlockLoss, WeightTraining
from fxquant.demo.models import NAMES, build
from fxquant.graph.blocks import find_blocks
from fxquant.reconstruction.blockwise import BlockContext, BlockwiseRunner
from fxquant.reconstruction.image_split import ImageSplit
from fxquant.reconstruction.losses import Measured, criterion
from fxquant.reconstruction.trained_block import TrainedBlock
from fxquant.reconstruction.training import train_block

_MEMORY_BYTES = 1 << 30


def seconds(call: Callable[[], object]) -> float:
    """Wall time of a call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def float_pass(context: BlockContext, index: Tensor) -> None:
    """Forward and backward pass of the float block."""
    with torch.enable_grad():
        values = context.float_inputs.get(index, context.device)
        inputs = {name: value.clone().requires_grad_() for name, value in values.items()}
        outputs = context.teacher.run_block(context.block, inputs)
        target = context.float_outputs.get(index, context.device)
        torch.stack(
            [(outputs[name] - target[name] - 1).square().mean() for name in outputs]
        ).sum().backward()


def steps(gm: fx.GraphModule, context: BlockContext, options: Reconstruction) -> None:
    """Trains the block, and discards the result."""
    block = TrainedBlock(gm, context, options, torch.Generator().manual_seed(0))
    every = torch.arange(context.count)
    loss = criterion(options, Measured({}, None), context)
    train_block(block, context, loss, options, ImageSplit(every, every))


def middle(gm: fx.GraphModule, runner: BlockwiseRunner) -> Iterator[BlockContext]:
    """Yields the block in the middle of the network."""
    blocks = find_blocks(gm)
    for number, context in enumerate(runner.walk(gm, blocks, "walk", _MEMORY_BYTES)):
        if number == len(blocks) // 2:
            yield context
            return


def ratios(
    gm: fx.GraphModule, context: BlockContext, options: Reconstruction, rounds: int
) -> list[float]:
    """Ratio of the time of a step to that of a float pass, for each round."""
    index, count, found = torch.arange(options.batch), options.iterations, []
    more = replace(options, iterations=3 * count)
    for _ in range(rounds):
        one = seconds(lambda: [float_pass(context, index) for _ in range(2 * count)])
        # The work that is done once per block is in both trainings, and cancels.
        few, many = (seconds(partial(steps, gm, context, o)) for o in (options, more))
        found.append((many - few) / one)
    return found


def main() -> None:
    """Prints a row for each kind of weight training."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="glyph_vit")
    parser.add_argument("--batch", type=positive, default=32)
    parser.add_argument("--images", type=positive, default=32)
    parser.add_argument("--rounds", type=positive, default=5)
    parser.add_argument("--steps", type=positive, default=8, help="of the shorter training")
    parser.add_argument("--threads", type=positive, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.set_flush_denormal(True)
    torch.manual_seed(0)
    demo = options.model in NAMES
    model = build(options.model) if demo else timm.create_model(options.model).eval()
    size = (3, 64, 64) if demo else model.pretrained_cfg["input_size"]
    images = torch.randn(options.images, *size)
    compiled = fxquant.compile(model, images.split(8), policies.minmax(4, 4))
    gm = compiled.graph_module
    runner = BlockwiseRunner(gm, images)
    table = Table(options.model, "step / float pass", "smallest", "largest")
    for context in middle(gm, runner):
        context.teacher.graph_module.requires_grad_(True)
        for kind in WeightTraining:
            chosen = Reconstruction(
                weights=kind,
                block_loss=BlockLoss.MSE,
                iterations=options.steps,
                batch=options.batch,
                held_out=0.0,
            )
            found = ratios(gm, context, chosen, options.rounds)
            shown = (statistics.median(found), min(found), max(found))
            table.add_row(str(kind), *(f"{value:.2f}" for value in shown))
    Console(width=80).print(table)


if __name__ == "__main__":
    main()

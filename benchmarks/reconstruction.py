"""What a training step costs beside the float block's forward and backward pass.

    python benchmarks/reconstruction.py --model deit_small_patch16_224

Of the block in the middle of the network, 4-bit weights and activations, squared error: the median
over the rounds of the time of one step (draw, forward, backward, update) over that of the float
block's forward and backward pass for as many images, each with gradients for inputs and weights.
Both are timed in turns in the same run; weights are random, but for the shipped models.
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
from fxquant.reconstruction.losses import Measured, criterion
from fxquant.reconstruction.trained_block import TrainedBlock
from fxquant.reconstruction.training import train_block

_BYTES = 1 << 30


def seconds(call: Callable[[], object]) -> float:
    """Wall time of a call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def float_pass(station: BlockContext, index: Tensor) -> None:
    """Forward and backward pass of the float block."""
    with torch.enable_grad():
        values = station.exact.get(index, station.device)
        given = {name: value.clone().requires_grad_() for name, value in values.items()}
        found = station.teacher.run_block(station.block, given)
        target = station.target.get(index, station.device)
        torch.stack(
            [(found[name] - target[name] - 1).square().mean() for name in found]
        ).sum().backward()


def steps(gm: fx.GraphModule, station: BlockContext, options: Reconstruction) -> None:
    """Trains the block, and forgets what it became."""
    block = TrainedBlock(gm, station, options, torch.Generator().manual_seed(0))
    every = torch.arange(station.count)
    loss = criterion(options, Measured({}, None), station)
    train_block(block, station, loss, options, (every, every))


def middle(gm: fx.GraphModule, sides: BlockwiseRunner) -> Iterator[BlockContext]:
    """The block in the middle."""
    blocks = find_blocks(gm)
    for number, station in enumerate(sides.walk(gm, blocks, "walk", _BYTES)):
        if number == len(blocks) // 2:
            yield station
            return


def ratios(
    gm: fx.GraphModule, station: BlockContext, options: Reconstruction, rounds: int
) -> list[float]:
    """Of each round: a step over a float pass."""
    index, count, found = torch.arange(options.batch), options.iterations, []
    more = replace(options, iterations=3 * count)
    for _ in range(rounds):
        one = seconds(lambda: [float_pass(station, index) for _ in range(2 * count)])
        # What is done once for a block is in both.
        few, many = (seconds(partial(steps, gm, station, o)) for o in (options, more))
        found.append((many - few) / one)
    return found


def main() -> None:
    """Prints a row for each thing that can be trained."""
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
    sides = BlockwiseRunner(gm, images)
    table = Table(options.model, "step / float pass", "smallest", "largest")
    for station in middle(gm, sides):
        station.teacher.graph_module.requires_grad_(True)
        for kind in WeightTraining:
            chosen = Reconstruction(
                weights=kind,
                block_loss=BlockLoss.MSE,
                iterations=options.steps,
                batch=options.batch,
                held_out=0.0,
            )
            found = ratios(gm, station, chosen, options.rounds)
            shown = (statistics.median(found), min(found), max(found))
            table.add_row(str(kind), *(f"{value:.2f}" for value in shown))
    Console(width=80).print(table)


if __name__ == "__main__":
    main()

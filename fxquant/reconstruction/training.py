"""Trains one block, step by step."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from fxquant.config.recovery import Reconstruction
from fxquant.reconstruction.augment import fresh
from fxquant.reconstruction.blockwise import CHUNK, BlockContext
from fxquant.reconstruction.checkpoint import StateFile
from fxquant.reconstruction.curriculum import Curriculum
from fxquant.reconstruction.losses import Criterion
from fxquant.reconstruction.steps import add_gradients, backward, search_ranks, take_step
from fxquant.reconstruction.trained_block import Changes, TrainedBlock
from fxquant.utils.progress import track

# The regularizer of roundings beside a loss that starts at one.
_PUSH = 1.0
# How often the loss is looked at, the state kept, and a curriculum sorts the images anew.
_LOOKS = 8
# Images made to judge by where none are held out, at most.
_MADE = 128


def train_block(
    block: TrainedBlock,
    station: BlockContext,
    criterion: Criterion,
    options: Reconstruction,
    parts: tuple[Tensor, Tensor],
    kept: StateFile | None = None,
    shown: str | None = None,
) -> tuple[Changes | None, float, float]:
    """Trains a block.

    Args:
        block: its trained parts; changed.
        station: its data.
        criterion: its loss.
        options: steps and rates.
        parts: numbers of the images that judge, and of those that train (:func:`split`).
        kept: the file where the state is kept at each look, and taken from if it is there.
        shown: what the progress calls it, on stderr; None shows none.

    Returns:
        What the block was when its loss was least, None where that is before the first step; and
        the loss before and then: without drops, the mean over the images held out.

    Raises:
        OutputError: the state cannot be written.
        FileFormatError: it is damaged.
    """
    judges, own = parts
    judged = station
    if options.augment and torch.equal(judges, own):  # else they judge that the weights fit best
        judged = fresh(station, own, _made(station, options))
        judges = torch.arange(judged.count)

    def loss() -> float:
        return float(image_losses(block, judged, criterion, judges).mean())

    before = loss()
    if not block.groups(options) or not 0 < before < math.inf:
        return None, before, before
    state = None if kept is None else kept.read()
    if state is not None:
        block.settle_ranks(state["ranks"])
    elif block.searches_ranks:
        search_ranks(block, station, criterion, options, before, own)
    run = _Run(block, station, criterion, options, len(own), before)
    if state is not None:
        run.load(state)
    left = track(
        range(run.step, options.iterations),
        label=lambda: f"{shown}, loss x {run.last / before:.3f}",
        total=options.iterations,
        done=run.step,
        enabled=shown is not None,
    )
    _train(run, left, own, loss, kept)
    if run.best is None:
        return None, before, before
    block.load_state_dict(run.best)
    return block.changes(), before, run.least


def _train(
    run: _Run, steps: Iterable[int], own: Tensor, loss: Callable[[], float], kept: StateFile | None
) -> None:
    """Takes the steps, and looks at the loss every so often.

    Args:
        run: the training.
        steps: their numbers.
        own: numbers of the images to train on.
        loss: of the images that judge.
        kept: takes the state at each look.
    """
    total = run.options.iterations
    every = math.ceil(total / _LOOKS)
    for step in steps:
        if run.plan.sorts and step % every == 0:
            run.plan.sort(image_losses(run.block, run.station, run.criterion, own))
        run.take(own[run.plan.draw(step)])
        if run.step % every == 0 or run.step == total:
            run.judge(loss())
            if kept is not None and run.step < total:
                kept.write(run.state())


def _made(station: BlockContext, options: Reconstruction) -> int:
    """How many images are made to judge by, in a quarter of the memory."""
    each = station.given.bytes_per_image + station.target.bytes_per_image
    return min(max(options.memory_bytes // 4 // max(each, 1), CHUNK), _MADE)


class _Run:
    """The training of a block as far as it has come.

    Args:
        block: its ranks settled.
        station: its data.
        criterion: its loss.
        options: steps and rates.
        count: number of images that it is trained on.
        before: its loss now.
    """

    def __init__(
        self,
        block: TrainedBlock,
        station: BlockContext,
        criterion: Criterion,
        options: Reconstruction,
        count: int,
        before: float,
    ) -> None:
        self.step, self.least, self.last = 0, before, before
        self.best: dict[str, Any] | None = None
        self.block, self.station, self.criterion = block, station, criterion
        self.options, self._before, self._device = options, before, station.device
        self._generator = torch.Generator().manual_seed(options.seed)
        self.plan = Curriculum(
            count, options.batch, options.iterations, options.curriculum, self._generator
        )
        self._optimizer = torch.optim.Adam(block.groups(options))
        self._schedule = torch.optim.lr_scheduler.LambdaLR(
            self._optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * step / options.iterations))
        )

    def take(self, images: Tensor) -> None:
        """Takes a step by the loss of some images.

        Args:
            images: their numbers, ``(n,)``.
        """
        block, options = self.block.train(), self.options
        self._optimizer.zero_grad()
        add_gradients(block, self.station, self.criterion, options, images, self._before)
        with torch.enable_grad():
            push = block.regularizer(self.step / options.iterations)
            if push is not None:
                backward(_PUSH * push)
        take_step(self._optimizer)
        self._schedule.step()
        self.step += 1

    def judge(self, loss: float) -> None:
        """Keeps the block as it is now where its loss is the least so far."""
        self.last = loss
        if loss < self.least:
            self.least, self.best = loss, copy.deepcopy(self.block.state_dict())

    def state(self) -> dict[str, Any]:
        """All that the next steps depend on. Just before one that sorts: the order is not in it."""
        drawn = [torch.get_rng_state(), self._generator.get_state()]
        if self._device.type == "cuda":
            drawn.append(torch.cuda.get_rng_state(self._device))
        return {
            "step": self.step,
            "least": self.least,
            "last": self.last,
            "ranks": self.block.ranks,
            "best": self.best,
            "block": self.block.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "schedule": self._schedule.state_dict(),
            "drawn": drawn,
        }

    def load(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`state`."""
        self.step, self.least, self.best = state["step"], state["least"], state["best"]
        self.last = state["last"]
        self.block.load_state_dict(state["block"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._schedule.load_state_dict(state["schedule"])
        drawn = [one.cpu() for one in state["drawn"]]
        torch.set_rng_state(drawn[0])
        self._generator.set_state(drawn[1])
        if self._device.type == "cuda":
            torch.cuda.set_rng_state(drawn[2], self._device)


def split(count: int, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Numbers of the images that judge and of those that train.

    At least one judges; where there is no other, or share is 0, all do both.
    """
    generator = torch.Generator().manual_seed(seed)
    held = max(1, round(share * count)) if share else 0
    if not 0 < held < count:
        return torch.arange(count), torch.arange(count)
    order = torch.randperm(count, generator=generator)
    return order[:held].sort().values, order[held:].sort().values


@torch.no_grad()
def image_losses(
    block: TrainedBlock, station: BlockContext, criterion: Criterion, images: Tensor
) -> Tensor:
    """The loss of each of some images, ``(n,)``, without drops.

    Args:
        block: its trained parts.
        station: its data.
        criterion: its loss.
        images: their numbers, ``(n,)``.
    """
    block.eval()
    found = []
    for index in torch.split(images, CHUNK):
        given, target = (
            shelf.get(index, station.device) for shelf in (station.given, station.target)
        )
        found.append(criterion(block(given), target, index))
    return torch.cat(found)

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
from fxquant.reconstruction.image_split import ImageSplit
from fxquant.reconstruction.losses import Criterion
from fxquant.reconstruction.steps import add_gradients, backward, search_ranks, take_step
from fxquant.reconstruction.trained_block import TrainedBlock, TrainingResult
from fxquant.utils.progress import track

# Weight of the regularizer of roundings, relative to a loss that starts at one.
_REGULARIZER_WEIGHT = 1.0
# Number of validations; at each the state is saved and a curriculum sorts the images again.
_VALIDATIONS = 8
# Largest number of images that are augmented for validation where none are held out.
_MAX_AUGMENTED = 128


def train_block(
    block: TrainedBlock,
    context: BlockContext,
    criterion: Criterion,
    options: Reconstruction,
    split: ImageSplit,
    state_file: StateFile | None = None,
    label: str | None = None,
) -> TrainingResult:
    """Trains a block.

    Args:
        block: the block with its trained parameters; changed.
        context: data of the block.
        criterion: loss of the block.
        options: steps and learning rates.
        split: images to train on, and images whose loss decides which state is best.
        state_file: file of an unfinished training, which continues from the state in the file;
            written at each validation.
        label: name of the training in the progress on stderr; None shows no progress.

    Raises:
        OutputError: the state cannot be written.
        FileFormatError: the state is damaged.
    """
    validation, validation_context = split.validation, context
    # Without held-out images, the loss on augmented copies is less biased than on training images.
    if options.augment and not split.holds_out:
        validation_context = fresh(context, split.training, _augmented_count(context, options))
        validation = torch.arange(validation_context.count)

    def validate() -> float:
        return float(image_losses(block, validation_context, criterion, validation).mean())

    before = validate()
    if not block.groups(options) or not 0 < before < math.inf:
        return TrainingResult(None, before, before)
    state = None if state_file is None else state_file.read()
    if state is not None:
        block.settle_ranks(state["ranks"])
    elif block.searches_ranks:
        search_ranks(block, context, criterion, options, before, split.training)
    run = _Run(block, context, criterion, options, len(split.training), before)
    if state is not None:
        run.load(state)
    steps = track(
        range(run.step, options.iterations),
        label=lambda: f"{label}, loss x {run.last / before:.3f}",
        total=options.iterations,
        done=run.step,
        enabled=label is not None,
    )
    _train(run, steps, split.training, validate, state_file)
    if run.best is None:
        return TrainingResult(None, before, before)
    block.load_state_dict(run.best)
    return TrainingResult(block.changes(), before, run.least)


def _train(
    run: _Run,
    steps: Iterable[int],
    images: Tensor,
    validate: Callable[[], float],
    state_file: StateFile | None,
) -> None:
    """Takes the steps, and measures the validation loss at equal intervals.

    Args:
        run: the training.
        steps: the steps' numbers.
        images: indices of the images to train on, ``(n,)``.
        validate: measures the validation loss.
        state_file: file that the state is written to at each validation.
    """
    total = run.options.iterations
    every = math.ceil(total / _VALIDATIONS)
    for step in steps:
        if run.curriculum.sorts and step % every == 0:
            run.curriculum.sort(image_losses(run.block, run.context, run.criterion, images))
        run.take(images[run.curriculum.draw(step)])
        if run.step % every == 0 or run.step == total:
            run.record_validation(validate())
            if state_file is not None and run.step < total:
                state_file.write(run.state())


def _augmented_count(context: BlockContext, options: Reconstruction) -> int:
    """Number of images that are augmented for validation, within a quarter of the memory."""
    size = context.quantized_inputs.bytes_per_image + context.float_outputs.bytes_per_image
    return min(max(options.memory_bytes // 4 // max(size, 1), CHUNK), _MAX_AUGMENTED)


class _Run:
    """The state of the training of a block, and its steps.

    Args:
        block: a block with settled ranks.
        context: data of the block.
        criterion: loss of the block.
        options: steps and learning rates.
        count: number of training images.
        before: validation loss before the first step.
    """

    def __init__(
        self,
        block: TrainedBlock,
        context: BlockContext,
        criterion: Criterion,
        options: Reconstruction,
        count: int,
        before: float,
    ) -> None:
        self.step, self.least, self.last = 0, before, before
        self.best: dict[str, Any] | None = None
        self.block, self.context, self.criterion = block, context, criterion
        self.options, self._before, self._device = options, before, context.device
        self._generator = torch.Generator().manual_seed(options.seed)
        self.curriculum = Curriculum(
            count, options.batch, options.iterations, options.curriculum, self._generator
        )
        self._optimizer = torch.optim.Adam(block.groups(options))
        self._schedule = torch.optim.lr_scheduler.LambdaLR(
            self._optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * step / options.iterations))
        )

    def take(self, images: Tensor) -> None:
        """Takes a step by the loss of some images.

        Args:
            images: indices of the images, ``(n,)``.
        """
        block, options = self.block.train(), self.options
        self._optimizer.zero_grad()
        add_gradients(block, self.context, self.criterion, options, images, self._before)
        with torch.enable_grad():
            regularizer = block.regularizer(self.step / options.iterations)
            if regularizer is not None:
                backward(_REGULARIZER_WEIGHT * regularizer)
        take_step(self._optimizer)
        self._schedule.step()
        self.step += 1

    def record_validation(self, loss: float) -> None:
        """Keeps the block's present state where its validation loss is the least so far."""
        self.last = loss
        if loss < self.least:
            self.least, self.best = loss, copy.deepcopy(self.block.state_dict())

    def state(self) -> dict[str, Any]:
        """The state that the next steps depend on, except the order of a curriculum.

        The first step after each validation sorts the images: the state need not contain the order.
        """
        generator_states = [torch.get_rng_state(), self._generator.get_state()]
        if self._device.type == "cuda":
            generator_states.append(torch.cuda.get_rng_state(self._device))
        return {
            "step": self.step,
            "least": self.least,
            "last": self.last,
            "ranks": self.block.ranks,
            "best": self.best,
            "block": self.block.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "schedule": self._schedule.state_dict(),
            "drawn": generator_states,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Restores a state that :meth:`state` returned."""
        self.step, self.least, self.best = state["step"], state["least"], state["best"]
        self.last = state["last"]
        self.block.load_state_dict(state["block"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._schedule.load_state_dict(state["schedule"])
        generator_states = [generator_state.cpu() for generator_state in state["drawn"]]
        torch.set_rng_state(generator_states[0])
        self._generator.set_state(generator_states[1])
        if self._device.type == "cuda":
            torch.cuda.set_rng_state(generator_states[2], self._device)


@torch.no_grad()
def image_losses(
    block: TrainedBlock, context: BlockContext, criterion: Criterion, images: Tensor
) -> Tensor:
    """The losses of some images, ``(n,)``, without drops.

    Args:
        block: the block with its trained parameters.
        context: data of the block.
        criterion: loss of the block.
        images: indices of the images, ``(n,)``.
    """
    block.eval()
    losses = []
    for index in torch.split(images, CHUNK):
        inputs = context.quantized_inputs.get(index, context.device)
        float_outputs = context.float_outputs.get(index, context.device)
        losses.append(criterion(block(inputs), float_outputs, index))
    return torch.cat(losses)

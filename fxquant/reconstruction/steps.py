"""One step of training, and the steps that search for ranks."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fxquant.config.recovery import Reconstruction
from fxquant.quantizers.trained import draw_mask
from fxquant.reconstruction.augment import augmented, float_targets
from fxquant.reconstruction.blockwise import BlockContext, Values
from fxquant.reconstruction.losses import Criterion
from fxquant.reconstruction.rank_search import PREFERENCE
from fxquant.reconstruction.trained_block import TrainedBlock

# Largest norm of the gradient of a step, of a loss that starts at one.
_CLIP = 10.0


def backward(loss: Tensor) -> None:
    """Adds the gradients of a loss."""
    loss.backward()  # type: ignore[no-untyped-call]


def take_step(optimizer: torch.optim.Optimizer) -> None:
    """Takes a step along the gradients there are; none where they are not finite."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = nn.utils.clip_grad_norm_(parameters, _CLIP)
    if bool(norm.isfinite()):  # one that is not would stay in the means of Adam
        optimizer.step()


def search_ranks(
    block: TrainedBlock,
    context: BlockContext,
    criterion: Criterion,
    options: Reconstruction,
    unit: float,
    images: Tensor,
) -> None:
    """Trains factors on one half of the images and preferences on the other, in turns.

    Args:
        block: with open ranks; settled in the end.
        context: its data.
        criterion: its loss.
        options: steps and rates.
        unit: the loss that counts as one.
        images: numbers of the images that it draws from, ``(n,)``.
    """
    generator = torch.Generator().manual_seed(options.seed)
    optimizer = torch.optim.Adam(block.groups(options))
    halves = images[torch.randperm(len(images), generator=generator)].chunk(2)
    halves = (halves[0], halves[-1])  # one image is in both
    block.train()
    for step in range(options.rank_iterations):
        turn = step % 2
        half = halves[turn]
        index = half[torch.randperm(len(half), generator=generator)[: options.batch]]
        optimizer.zero_grad()
        add_gradients(block, context, criterion, options, index, unit)
        for name, parameter in block.named_parameters():
            if name.endswith(PREFERENCE) != bool(turn):
                parameter.grad = None  # a step leaves it as it is
        take_step(optimizer)
    block.settle_ranks()


def add_gradients(
    block: TrainedBlock,
    context: BlockContext,
    criterion: Criterion,
    options: Reconstruction,
    images: Tensor,
    unit: float,
) -> None:
    """Adds the gradients of the mean loss of some images, in as many parts as memory asks for.

    Args:
        block: in training mode.
        context: its data.
        criterion: its loss.
        options: share of drops, memory, and whether images are made anew.
        images: their numbers, ``(n,)``.
        unit: the loss that counts as one.
    """
    at_once = max(1, options.memory_bytes // block.bytes_per_image)
    made: Values = {}
    if options.augment:  # all at once, since some are mixed with others
        inputs = context.quantized_inputs.get(images, context.device)
        made = {name: augmented(value) for name, value in inputs.items()}
    for place in torch.split(torch.arange(len(images)), at_once):
        index = images[place]
        inputs = {name: value[place] for name, value in made.items()}
        inputs = inputs or context.quantized_inputs.get(index, context.device)
        with torch.enable_grad():
            loss = _step_loss(block, context, criterion, index, inputs, options)
            backward(loss * (len(place) / len(images) / unit))


def _step_loss(
    block: TrainedBlock,
    context: BlockContext,
    criterion: Criterion,
    index: Tensor,
    inputs: Values,
    options: Reconstruction,
) -> Tensor:
    if options.augment:
        float_outputs = float_targets(context, inputs)
    else:
        float_outputs = context.float_outputs.get(index, context.device)
    # The inputs of the block are left unquantized for as large a share as the values in it.
    if options.drop and context.quantized_inputs is not context.float_inputs:
        float_inputs = context.float_inputs.get(index, context.device)
        inputs = {
            name: torch.lerp(value, float_inputs[name], draw_mask(value, options.drop))
            for name, value in inputs.items()
        }
    return criterion(block(inputs), float_outputs, index).mean()

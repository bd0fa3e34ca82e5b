"""A step of training, and the steps that search for ranks."""

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

# Norm that the gradient of a step is clipped to; the loss starts at one.
_MAX_GRADIENT_NORM = 10.0


def backward(loss: Tensor) -> None:
    """Adds the gradients of a loss to the parameters."""
    loss.backward()  # type: ignore[no-untyped-call]


def take_step(optimizer: torch.optim.Optimizer) -> None:
    """Takes a step with clipped gradients; takes none where the gradients are not finite."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = nn.utils.clip_grad_norm_(parameters, _MAX_GRADIENT_NORM)
    if bool(norm.isfinite()):  # other gradients would stay in the running means of Adam
        optimizer.step()


def search_ranks(
    block: TrainedBlock,
    context: BlockContext,
    criterion: Criterion,
    options: Reconstruction,
    unit: float,
    images: Tensor,
) -> None:
    """Trains factors on one half of the images and preferences on the other half, alternately.

    Args:
        block: a block with open ranks, which are settled in the end.
        context: data of the block.
        criterion: loss of the block.
        options: steps and learning rates.
        unit: losses are divided by this number.
        images: indices of the images that batches are drawn from, ``(n,)``.
    """
    generator = torch.Generator().manual_seed(options.seed)
    optimizer = torch.optim.Adam(block.groups(options))
    halves = images[torch.randperm(len(images), generator=generator)].chunk(2)
    halves = (halves[0], halves[-1])  # a single image is in both halves
    block.train()
    for step in range(options.rank_iterations):
        turn = step % 2
        half = halves[turn]
        index = half[torch.randperm(len(half), generator=generator)[: options.batch]]
        optimizer.zero_grad()
        add_gradients(block, context, criterion, options, index, unit)
        for name, parameter in block.named_parameters():
            if name.endswith(PREFERENCE) != bool(turn):
                parameter.grad = None  # the step does not change this parameter
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
    """Adds the gradients of the mean loss of some images, piece by piece within the memory budget.

    Args:
        block: a block in training mode.
        context: data of the block.
        criterion: loss of the block.
        options: share of drops, memory, and whether images are augmented at each step.
        images: indices of the images, ``(n,)``.
        unit: the loss is divided by this number.
    """
    at_once = max(1, options.memory_bytes // block.bytes_per_image)
    augmented_inputs: Values = {}
    if options.augment:  # all images at once, since images are mixed with each other
        inputs = context.quantized_inputs.get(images, context.device)
        augmented_inputs = {name: augmented(value) for name, value in inputs.items()}
    for positions in torch.split(torch.arange(len(images)), at_once):
        index = images[positions]
        inputs = {name: value[positions] for name, value in augmented_inputs.items()}
        inputs = inputs or context.quantized_inputs.get(index, context.device)
        with torch.enable_grad():
            loss = _step_loss(block, context, criterion, index, inputs, options)
            backward(loss * (len(positions) / len(images) / unit))


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
    # The same share of the block's inputs as of the values inside the block stays unquantized.
    if options.drop and context.quantized_inputs is not context.float_inputs:
        float_inputs = context.float_inputs.get(index, context.device)
        inputs = {
            name: torch.lerp(value, float_inputs[name], draw_mask(value, options.drop))
            for name, value in inputs.items()
        }
    return criterion(block(inputs), float_outputs, index).mean()

"""Losses of a quantized block's outputs against the float outputs, one loss per image."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import kl_div

from fxquant.calibration.output_loss import OutputLoss
from fxquant.config.recovery import BlockLoss, Reconstruction
from fxquant.errors import PolicyError
from fxquant.graph.blocks import Block
from fxquant.graph.capture import device_of
from fxquant.graph.meta import EMBEDDINGS
from fxquant.graph.outputs import is_logits
from fxquant.reconstruction.blockwise import (
    ActivationStore,
    BlockContext,
    BlockRunner,
    Values,
    chunks,
    embedding_names,
)

# Replaces minus infinity where both networks mask a value: its share of a softmax is 0.
_MASKED_LOGIT = -1e30
# Images in one backward pass of the whole network.
_GRADIENT_BATCH = 4
_FEATURES = "features"

# Weights that broadcast against a value at a cut, by name of the value.
Importance = dict[str, Tensor]


class Criterion(ABC):
    """The loss of one block."""

    @abstractmethod
    def __call__(self, outputs: Values, float_outputs: Values, index: Tensor) -> Tensor:
        """Losses ``(B,)`` of images.

        Args:
            outputs: outputs of the quantized block.
            float_outputs: outputs of the float block.
            index: indices of the images.
        """


class SquaredError(Criterion):
    """Squared error, weighted where a value has weights; or the divergence of logits.

    Args:
        importance: weights by name of the value; a value without weights is not weighted.
        divergence: compare logits by KL(float || quantized).
        embeddings: names of values ``(B, C)`` that are not logits.
    """

    def __init__(
        self,
        importance: Importance,
        *,
        divergence: bool,
        embeddings: frozenset[str] = frozenset(),
    ) -> None:
        self._importance, self._divergence = importance, divergence
        self._embeddings = embeddings

    def __call__(self, outputs: Values, float_outputs: Values, index: Tensor) -> Tensor:
        """Losses ``(B,)`` of images; zero where no output of the network is a float tensor."""
        if not float_outputs:
            return torch.zeros(len(index))
        losses = [self._value_loss(name, outputs[name], y) for name, y in float_outputs.items()]
        return torch.stack(losses).sum(0)

    def _value_loss(self, name: str, output: Tensor, target: Tensor) -> Tensor:
        masked = output.isneginf() & target.isneginf()
        output, target = (value.masked_fill(masked, _MASKED_LOGIT) for value in (output, target))
        if self._divergence and is_logits(target) and name not in self._embeddings:
            expected, actual = target.log_softmax(1), output.log_softmax(1)
            return kl_div(actual, expected, log_target=True, reduction="none").sum(1)
        error = (output - target).square()
        weights = self._importance.get(name)
        if weights is not None:
            error = error * weights
        return error.reshape(len(error), -1).mean(1)


class Feature(Criterion):
    """Twice the block's squared error plus the squared error of the last product's input.

    Each error is divided by its mean at the first call.

    Args:
        context: the block; the blocks after it run in float.
        features: inputs of the last product of the float network, of all images.
    """

    def __init__(self, context: BlockContext, features: ActivationStore) -> None:
        self._context, self._features = context, features
        self._block = SquaredError({}, divergence=False)
        self._sizes: tuple[float, float] | None = None

    def __call__(self, outputs: Values, float_outputs: Values, index: Tensor) -> Tensor:
        """Losses ``(B,)`` of images."""
        block_error = self._block(outputs, float_outputs, index)
        context = self._context
        expected = self._features.get(index, context.device)[_FEATURES]
        features = last_input(context.teacher, context.rest, outputs)
        feature_error = (features - expected).square().flatten(1).mean(1)
        if self._sizes is None:
            self._sizes = float(block_error.detach().mean()), float(feature_error.detach().mean())
        block_size, feature_size = (max(size, 1e-12) for size in self._sizes)
        return 2 * block_error / block_size + feature_error / feature_size


@dataclass(frozen=True)
class Measured:
    """Measurements on the float network that the losses of all blocks use.

    Attributes:
        importance: weights of values at cuts; empty where no value is weighted.
        features: inputs of the last product, of all images; None where no loss compares features.
    """

    importance: Importance
    features: ActivationStore | None


def measure(
    teacher: BlockRunner,
    blocks: tuple[Block, ...],
    images: Tensor,
    options: Reconstruction,
    folder: Path,
) -> Measured:
    """Runs the float network for the measurements that the block loss of the options needs.

    Args:
        teacher: runs the float network.
        blocks: all blocks.
        images: ``(n, …)``.
        options: the block loss, and the budget of memory.
        folder: folder for features that exceed the budget.
    """
    importance: Importance = {}
    features = None
    # The last block is compared by its outputs: a single block needs neither measurement.
    if options.block_loss is BlockLoss.FISHER and len(blocks) > 1:
        importance = measure_importance(teacher, blocks, images, options)
    if options.block_loss is BlockLoss.FEATURE and len(blocks) > 1:
        features = ActivationStore(len(images), folder, options.memory_bytes // 8)
        measure_features(teacher, blocks, images, features)
    return Measured(importance, features)


def criterion(options: Reconstruction, measured: Measured, context: BlockContext) -> Criterion:
    """The block loss of the options, for one block; the last block is compared by its outputs."""
    if measured.features is not None and context.rest:
        return Feature(context, measured.features)
    divergence = options.block_loss is not BlockLoss.MSE and not context.rest
    embeddings = embedding_names(context.teacher.graph_module)
    return SquaredError(measured.importance, divergence=divergence, embeddings=embeddings)


def measure_importance(
    teacher: BlockRunner, blocks: tuple[Block, ...], images: Tensor, options: Reconstruction
) -> Importance:
    """Squared gradients of a loss of the outputs by the values at each cut, a mean over images.

    The mean is replaced by the product of its averages along each axis, scaled to a mean of one:
    the importance of each token and of each channel, far fewer numbers to estimate from few images.

    Args:
        teacher: runs the float network.
        blocks: all blocks.
        images: ``(n, …)``, moved to the graph's device batch by batch.
        options: the loss of the outputs.
    """
    device = device_of(teacher.graph_module)
    embeddings = EMBEDDINGS.get(teacher.graph_module)
    loss = OutputLoss(options.gradient, options.seed, device, embeddings)
    sums: Importance = {}
    for batch in torch.split(images, _GRADIENT_BATCH):
        with torch.enable_grad():
            cuts: Values = {}
            values: Values = {blocks[0].inputs[0].name: batch.to(device)}
            for block in blocks:
                values = teacher.run_block(block, values)
                if block is not blocks[-1]:
                    # Values at a cut are leaves or retain their gradient, which is read below.
                    values = {k: v.detach() if not cuts else v for k, v in values.items()}
                    for value in values.values():
                        value.requires_grad_().retain_grad()
                    cuts |= values
            loss(values).backward()  # type: ignore[no-untyped-call]
        for name, value in cuts.items():
            if value.grad is not None:
                sums[name] = sums.get(name, 0) + value.grad.square().sum(0)
    return {name: _separable(total) for name, total in sums.items() if bool(total.any())}


def _separable(total: Tensor) -> Tensor:
    """The product of the means along each axis, scaled to a mean of one."""
    product = torch.ones_like(total)
    for axis in range(total.ndim):
        other_axes = [other for other in range(total.ndim) if other != axis]
        product = product * (total.mean(other_axes, keepdim=True) if other_axes else total)
    return product / product.mean().clamp(min=1e-30)


@torch.no_grad()
def measure_features(
    teacher: BlockRunner, blocks: tuple[Block, ...], images: Tensor, store: ActivationStore
) -> None:
    """Stores the inputs of the last product.

    Args:
        teacher: runs the float network.
        blocks: all blocks.
        images: ``(n, …)``, moved to the graph's device chunk by chunk.
        store: store for the inputs of all images.

    Raises:
        PolicyError: the inputs are not laid out image by image.
    """
    device, (start,) = device_of(teacher.graph_module), blocks[0].inputs
    of_one, of_two = (
        last_input(teacher, blocks, {start.name: images[:count].to(device)}) for count in (1, 2)
    )
    tolerance = 1e-3 * float(of_one.abs().max())
    same_shape = of_one.shape[1:] == of_two.shape[1:]
    if not same_shape or not torch.allclose(of_one[0], of_two[0], atol=tolerance):
        raise PolicyError(
            f"block_loss 'feature' compares the input of {blocks[-1].products[-1].name} image by "
            "image, but that input is not laid out image by image: choose 'fisher' or 'mse'",
            edge=blocks[-1].products[-1].name,
        )
    for chunk in chunks(len(images)):
        features = last_input(teacher, blocks, {start.name: images[chunk].to(device)})
        store.put(chunk.start, {_FEATURES: features})


def last_input(teacher: BlockRunner, blocks: tuple[Block, ...], values: Values) -> Tensor:
    """The input of the last product of some blocks, from the values at their start.

    The result has one entry per image, also where the first axis of the product's input lists the
    tokens or windows of one image after those of the previous image.
    """
    inputs: list[Tensor] = []
    count = len(next(iter(values.values())))
    watch = {blocks[-1].products[-1].name: lambda args, _: inputs.append(args[0])}
    for block in blocks:
        values = teacher.run_block(block, values, watch=watch)
    (features,) = inputs
    if len(features) % count:
        return features
    return features.reshape(count, -1, *features.shape[1:]).squeeze(1)

"""Losses of the outputs of the float model, without labels, whose gradient weights errors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fxquant.config.scale_search import GradientLoss
from fxquant.errors import CalibrationError
from fxquant.graph.outputs import float_outputs, is_logits


class OutputLoss:
    """A loss of the outputs of the float model, without labels, summed over images.

    Args:
        kind: the loss.
        seed: seed of sampled labels and noise.
        device: device of the outputs.
        embeddings: positions, among the float outputs, of outputs ``(B, C)`` that are not logits.
    """

    def __init__(
        self,
        kind: GradientLoss,
        seed: int,
        device: torch.device,
        embeddings: frozenset[int] | None = None,
    ) -> None:
        self._kind, self._device = kind, device
        self._embeddings = embeddings or frozenset()
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, outputs: Any, labels: Tensor | None = None) -> Tensor:
        """The loss, ``()``.

        Raises:
            CalibrationError: no output has a gradient.
        """
        trainable = [(i, x) for i, x in enumerate(float_outputs(outputs)) if x.requires_grad]
        if not trainable:
            raise CalibrationError(
                "no output of the model has a gradient, which the search's metric needs: choose "
                "another metric in the policy's search, or remove the argmax from the model"
            )
        return torch.stack([self._output_loss(i, x) for i, x in trainable]).sum()

    def _output_loss(self, position: int, output: Tensor) -> Tensor:
        """The loss of one output; outputs that are not logits have the Gaussian loss."""
        logits = is_logits(output) and position not in self._embeddings
        if self._kind is GradientLoss.GAUSSIAN or not logits:
            noise = torch.randn(output.shape, generator=self._generator).to(self._device)
            # The gradient of 0.5 |O - (O + noise)|^2 with the target held fixed.
            return -(output * noise).sum()
        if self._kind is GradientLoss.MARGIN:
            top = output.detach().argmax(1, keepdim=True)
            other_classes = output.scatter(1, top, -torch.inf).logsumexp(1)
            return (output.gather(1, top)[:, 0] - other_classes).sum()
        if self._kind is GradientLoss.ARGMAX:
            target = output.detach().argmax(1)
        else:
            probabilities = output.detach().softmax(1).cpu()
            target = torch.multinomial(probabilities, 1, generator=self._generator)[:, 0].to(
                self._device
            )
        return functional.cross_entropy(output, target, reduction="sum")

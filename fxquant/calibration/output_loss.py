"""Losses of the outputs of the float model alone, whose gradient weighs errors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fxquant.config.scale_search import GradientLoss
from fxquant.errors import CalibrationError
from fxquant.graph.outputs import float_outputs, is_logits


class OutputLoss:
    """A loss of the outputs of the float model alone, summed over images.

    Args:
        kind: which.
        seed: of sampled labels and noise.
        device: of the outputs.
    """

    def __init__(self, kind: GradientLoss, seed: int, device: torch.device) -> None:
        self._kind, self._device = kind, device
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, outputs: Any, labels: Tensor | None = None) -> Tensor:
        """The loss, ``()``.

        Raises:
            CalibrationError: no output has a gradient.
        """
        found = [x for x in float_outputs(outputs) if x.requires_grad]
        if not found:
            raise CalibrationError(
                "no output of the model has a gradient, which the search's metric needs: choose "
                "another metric in the policy's search, or take the argmax out of the model"
            )
        return torch.stack([self._of(x) for x in found]).sum()

    def _of(self, output: Tensor) -> Tensor:
        """Logits are ``(B, C)``; any other output gets the Gaussian loss."""
        if self._kind is GradientLoss.GAUSSIAN or not is_logits(output):
            noise = torch.randn(output.shape, generator=self._generator).to(self._device)
            # The gradient of 0.5 |O - (O + noise)|^2 with the target held fixed.
            return -(output * noise).sum()
        if self._kind is GradientLoss.MARGIN:
            top = output.detach().argmax(1, keepdim=True)
            others = output.scatter(1, top, -torch.inf).logsumexp(1)
            return (output.gather(1, top)[:, 0] - others).sum()
        if self._kind is GradientLoss.ARGMAX:
            target = output.detach().argmax(1)
        else:
            shares = output.detach().softmax(1).cpu()
            target = torch.multinomial(shares, 1, generator=self._generator)[:, 0].to(self._device)
        return functional.cross_entropy(output, target, reduction="sum")

"""Runs a graph over data."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, fx

from fxquant.capture import device_of
from fxquant.errors import BatchError, PassError
from fxquant.graph import stage
from fxquant.spec import Stage


@torch.no_grad()
def calibrate(gm: fx.GraphModule, batches: Iterable[Tensor]) -> int:
    """Shows every batch to the observers of a graph; keeps none of them.

    Args:
        gm: in stage OBSERVED.
        batches: images ``(B, …)`` each, moved to the device of the graph.

    Returns:
        Number of images seen.

    Raises:
        BatchError: the model does not take the images.
        NonFiniteError: an activation holds NaN or infinity.
        PassError: the graph is in another stage.
    """
    if stage(gm) is not Stage.OBSERVED:
        raise PassError(f"calibrate takes stage OBSERVED, got {stage(gm).name}")
    device, seen = device_of(gm), 0
    for images in batches:
        try:
            gm(images.to(device))
        except (RuntimeError, TypeError, AssertionError) as error:
            raise BatchError(
                f"the model does not take a batch of shape {tuple(images.shape)} ({error}); "
                "resize the images to the model's input size"
            ) from error
        seen += len(images)
    return seen

"""Runs a graph over data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx

from fxquant.config.vocabulary import Stage
from fxquant.errors import BatchError, PassError
from fxquant.graph.capture import device_of
from fxquant.graph.nodes import stage


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
    return run_batches(gm, gm, batches)


@contextmanager
def errors_as_input_error(images: Tensor) -> Iterator[None]:
    """Says of an error in a run of the model which images it did not take.

    Raises:
        BatchError: instead of the error.
    """
    try:
        yield
    except (RuntimeError, TypeError, AssertionError) as error:
        raise BatchError(
            f"the model does not take a batch of shape {tuple(images.shape)} ({error}); "
            "resize the images to the model's input size"
        ) from error


@torch.no_grad()
def run_batches(
    gm: fx.GraphModule, call: Callable[[Tensor], Any], batches: Iterable[Tensor]
) -> int:
    """Calls ``call`` with every batch, moved to the device of the graph.

    Returns:
        Number of images.

    Raises:
        BatchError: the model does not take a batch.
    """
    device, seen = device_of(gm), 0
    for images in batches:
        with errors_as_input_error(images):
            call(images.to(device))
        seen += len(images)
    return seen

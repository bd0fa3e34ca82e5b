"""Runs a model over batches; its errors name the shape of the images that failed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx

from fxquant.errors import BatchError
from fxquant.graph.capture import device_of


@contextmanager
def errors_as_input_error(images: Tensor) -> Iterator[None]:
    """Turns errors of a run of the model into errors that name the shape of the images.

    Raises:
        BatchError: the run raised an error.
    """
    try:
        yield
    except (RuntimeError, TypeError, AssertionError) as error:
        raise BatchError(
            f"the model does not accept a batch of shape {tuple(images.shape)} ({error}); "
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
        BatchError: the model does not accept a batch.
    """
    device, count = device_of(gm), 0
    for images in batches:
        with errors_as_input_error(images):
            call(images.to(device))
        count += len(images)
    return count

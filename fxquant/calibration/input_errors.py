"""Errors of a run of the model that name the shape of the images."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from fxquant.errors import BatchError


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
            "resize the images to the model's input size",
            got=tuple(images.shape),
        ) from error

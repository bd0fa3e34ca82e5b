"""The loss that a user gives to ``compile()``, whose errors are raised as CalibrationError.

Errors name the loss and what it was called with; what it gives is checked to be a number with a
gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from fxquant.errors import CalibrationError

# Model outputs and labels (None where the loader gives none) of up to four images to a number,
# summed over the images: a mean would weigh those of a smaller part more.
Loss = Callable[[Any, Tensor | None], Tensor]


def check_callable(loss: Any) -> None:
    """Checks that a loss can be called.

    Raises:
        CalibrationError: it cannot.
    """
    if not callable(loss):
        raise CalibrationError(
            f"loss must be a function of the model's outputs and the labels, got "
            f"{type(loss).__name__} {loss!r:.80}; to choose one by name, set the loss of the "
            "policy's search"
        )


@contextmanager
def errors_as_user_loss(labels: Tensor | None, where: str = "") -> Iterator[None]:
    """Says of an error that it came from the user's loss, and which labels that had.

    Args:
        labels: that the loss was called with.
        where: in the loss, as in " in its backward pass".

    Raises:
        CalibrationError: instead of any error.
    """
    try:
        yield
    except Exception as error:  # the user's code may raise anything
        given = (
            "labels None, since the batch had none that are numbers, one for each image: let "
            "calib_loader yield (images, labels), or do without them in the loss"
            if labels is None
            else f"labels of shape {tuple(labels.shape)} and type {labels.dtype}"
        )
        raise CalibrationError(
            f"the loss given to compile() raised {type(error).__name__}{where} ({error}). "
            f"It is called as loss(outputs, labels), here with {given}"
        ) from error


def check_scalar_loss(value: Any) -> None:
    """Checks what a loss gave.

    Raises:
        CalibrationError: it is not one finite real number with a gradient.
    """
    if (
        not isinstance(value, Tensor)
        or value.numel() != 1
        or not value.requires_grad
        or not value.is_floating_point()
    ):
        raise CalibrationError(
            "the loss must be one real number with a gradient, computed in torch from the model's "
            f"outputs; got {value!r:.80}"
        )
    if not bool(value.isfinite()):
        raise CalibrationError(
            f"the loss of a batch is {value.item()}, so its gradient says nothing; look for "
            "infinite outputs of the model, or a logarithm of zero or division by zero in the loss"
        )

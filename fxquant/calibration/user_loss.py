"""The loss that a user passes to ``compile()``, whose errors are raised as CalibrationError.

Errors name the loss and the labels of the call; the value of the loss is checked to be a number
with a gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from fxquant.errors import CalibrationError

# A function of model outputs and labels (None where the loader yields none) of up to four images,
# summed over the images: a mean would give the images of a smaller piece a larger weight.
Loss = Callable[[Any, Tensor | None], Tensor]


def check_callable(loss: Any) -> None:
    """Checks that a loss can be called.

    Raises:
        CalibrationError: the loss cannot be called.
    """
    if not callable(loss):
        raise CalibrationError(
            f"loss must be a function of the model's outputs and the labels, got "
            f"{type(loss).__name__} {loss!r:.80}; to choose one by name, set the loss of the "
            "policy's search",
            got=loss,
            expected="a function of outputs and labels",
        )


@contextmanager
def errors_as_user_loss(labels: Tensor | None, where: str = "") -> Iterator[None]:
    """Turns errors of the user's loss into errors that name the loss and its labels.

    Args:
        labels: labels that the loss was called with.
        where: place of the error in the loss, such as " in its backward pass".

    Raises:
        CalibrationError: the loss raised an error.
    """
    try:
        yield
    except Exception as error:  # the user's code may raise anything
        labels_text = (
            "labels None, since the batch had no numbers as labels, one for each image: let "
            "calib_loader yield (images, labels), or compute the loss without labels"
            if labels is None
            else f"labels of shape {tuple(labels.shape)} and type {labels.dtype}"
        )
        raise CalibrationError(
            f"the loss given to compile() raised {type(error).__name__}{where} ({error}). "
            f"It is called as loss(outputs, labels), here with {labels_text}"
        ) from error


def check_scalar_loss(value: Any) -> None:
    """Checks that the value of a loss is one finite real number with a gradient.

    Raises:
        CalibrationError: the value is not such a number.
    """
    if (
        not isinstance(value, Tensor)
        or value.numel() != 1
        or not value.requires_grad
        or not value.is_floating_point()
    ):
        raise CalibrationError(
            "the loss must be one real number with a gradient, computed in torch from the model's "
            f"outputs; got {value!r:.80}",
            got=value,
            expected="one real number with a gradient",
        )
    if not bool(value.isfinite()):
        raise CalibrationError(
            f"the loss of a batch is {value.item()}, so that its gradient is useless; look for "
            "infinite outputs of the model, or a logarithm of zero or division by zero in the loss",
            got=value.item(),
            expected="a finite number",
        )

"""Checks of a compiled model's input images, and the errors for images that it cannot use."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fxquant.errors import BatchError, NonFiniteError


def check_images(images: Any) -> Tensor:
    """Returns the images, after a check that they are a float tensor.

    Raises:
        BatchError: the images are not a float tensor.
    """
    if not isinstance(images, Tensor):
        raise BatchError(
            f"the model takes a tensor of images, got {type(images).__name__}",
            got=images,
            expected=Tensor,
        )
    if not images.is_floating_point():
        raise BatchError(
            f"the model takes float images, got {images.dtype}: convert and normalise them in the "
            "same way as the calibration images",
            got=images.dtype,
            expected=torch.float32,
        )
    return images


def check_shape(images: Tensor, image_shape: tuple[int, ...]) -> None:
    """Checks the size of images; any number of images is accepted.

    Args:
        images: a float tensor.
        image_shape: shape of one image that the model was compiled for.

    Raises:
        BatchError: the images are not ``(B, *image_shape)``.
    """
    if images.ndim == 0 or images.shape[1:] != image_shape:
        raise _shape_error(images, image_shape)


def batch_error(images: Tensor, image_shape: tuple[int, ...]) -> BatchError | None:
    """The error for an empty batch, or images that are not in float32; None for other images.

    Args:
        images: float tensor ``(B, *image_shape)``.
        image_shape: shape of one image that the model was compiled for.
    """
    if not len(images):
        return _shape_error(images, image_shape, ", no image")
    if images.dtype is not torch.float32:
        return BatchError(
            f"the model computes in float32, got images in {images.dtype}: call images.float()",
            got=images.dtype,
            expected=torch.float32,
        )
    return None


def _shape_error(images: Tensor, image_shape: tuple[int, ...], note: str = "") -> BatchError:
    actual, expected = tuple(images.shape), ", ".join(map(str, image_shape))
    return BatchError(
        f"the model was compiled for images of shape (B, {expected}), got {actual}{note}: "
        "resize them, or compile for that size",
        got=actual,
        expected=image_shape,
    )


@dataclass(frozen=True)
class InputCheck:
    """A forward pre-hook, with keywords, of lowered models, which do not check their input.

    Attributes:
        image_shape: shape of one image, which the widths of the kernels' sums were chosen for.
    """

    image_shape: tuple[int, ...]

    def __call__(self, module: nn.Module, args: tuple[Any, ...], named: Mapping[str, Any]) -> None:
        """Checks the first argument.

        Raises:
            BatchError: the argument is not a float tensor ``(B, *image_shape)`` with an image.
            NonFiniteError: the argument holds NaN or infinity, which have no integer codes.
        """
        images = check_images(next(iter((*args, *named.values())), None))
        check_shape(images, self.image_shape)
        error = batch_error(images, self.image_shape)
        if error is not None:
            raise error
        # A traced graph shall contain only the network.
        if not torch.compiler.is_compiling() and not bool(images.isfinite().all()):
            raise NonFiniteError(
                "the images hold NaN or infinity, which have no integer codes; look for a division "
                "by zero in the normalisation or a corrupt file"
            )

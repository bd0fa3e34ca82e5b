"""The division of the calibration images into training and validation images."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fxquant.config.recovery import Reconstruction


@dataclass(frozen=True, eq=False)
class ImageSplit:
    """Indices of the images for training and for validation, in ascending order.

    The loss of a validation image would underestimate the error of weights that were fitted to the
    image. For this reason compensation is fitted to the training images only, too.

    Attributes:
        validation: images whose loss decides which state of a training is best, ``(n,)``.
        training: images that weights are fitted to, ``(m,)``.
    """

    validation: Tensor
    training: Tensor

    @property
    def holds_out(self) -> bool:
        """Whether the validation images are not training images."""
        return not torch.equal(self.validation, self.training)


def split_images(count: int, options: Reconstruction | None) -> ImageSplit:
    """Holds images out at random for validation, at least one.

    No image is held out where no image would be left to train on.

    Args:
        count: number of images.
        options: share of the images held out, and the seed; None, or share 0, holds none out.

    Returns:
        The split; without images held out, both of its index tensors contain all images.
    """
    share = 0.0 if options is None else options.held_out
    held_out = max(1, round(share * count)) if share else 0
    if options is None or not 0 < held_out < count:
        return ImageSplit(torch.arange(count), torch.arange(count))
    order = torch.randperm(count, generator=torch.Generator().manual_seed(options.seed))
    return ImageSplit(order[:held_out].sort().values, order[held_out:].sort().values)

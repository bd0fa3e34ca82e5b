"""The division of the calibration images among training and validation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fxquant.config.recovery import Reconstruction


@dataclass(frozen=True, eq=False)
class ImageSplit:
    """Numbers of the images for training and for validation, in ascending order.

    Weights that were fitted to a validation image would look better by its loss than they are, so
    that compensation is fitted to the training images alone too.

    Attributes:
        validation: of the images whose loss decides which state of a training is best, ``(n,)``.
        training: of the images that weights are fitted to, ``(m,)``.
    """

    validation: Tensor
    training: Tensor

    @property
    def holds_out(self) -> bool:
        """Whether the validation images are not among those for training."""
        return not torch.equal(self.validation, self.training)


def split_images(count: int, options: Reconstruction | None) -> ImageSplit:
    """Holds images out at random, at least one; where that leaves none to train on, holds none out.

    Args:
        count: number of images.
        options: share of the images held out, and the seed; None, or share 0, holds none out.

    Returns:
        The two parts, both of them all images where none are held out.
    """
    share = 0.0 if options is None else options.held_out
    held_out = max(1, round(share * count)) if share else 0
    if options is None or not 0 < held_out < count:
        return ImageSplit(torch.arange(count), torch.arange(count))
    order = torch.randperm(count, generator=torch.Generator().manual_seed(options.seed))
    return ImageSplit(order[:held_out].sort().values, order[held_out:].sort().values)

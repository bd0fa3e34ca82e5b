"""The number of images to measure a loss on, and a uniform sample of images from batches."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

# Fewer images do not rank choices reliably; more images add little and need more memory.
_MIN_IMAGES, _MAX_IMAGES = 4, 32


def images_for(max_macs: float, macs_per_image: int) -> int:
    """Number of images to measure a loss on within a bound on multiplications, from 4 to 32.

    Args:
        max_macs: largest number of multiplications.
        macs_per_image: multiplications of one image.
    """
    return min(max(int(max_macs // max(macs_per_image, 1)), _MIN_IMAGES), _MAX_IMAGES)


class ReservoirSampler:
    """Samples ``count`` of the images that pass, each with the same chance (reservoir sampling).

    Args:
        count: number of images to keep; 0 keeps no image.
        seed: seed of the random choice.
    """

    def __init__(self, count: int, seed: int) -> None:
        self._count, self._random = count, random.Random(seed)
        self._reservoir: list[tuple[int, Tensor]] = []
        self._seen = 0

    def observe(
        self, batches: Iterable[tuple[Tensor, Tensor | None]]
    ) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Yields the batches unchanged, and samples images of each."""
        for images, labels in batches:
            for image in images:
                self._observe_image(image)
            yield images, labels

    def _observe_image(self, image: Tensor) -> None:
        slot = self._seen
        if len(self._reservoir) >= self._count:
            slot = self._random.randint(0, self._seen)
        if slot < self._count:
            self._reservoir[slot : slot + 1] = [(self._seen, image.clone())]
        self._seen += 1

    @property
    def images(self) -> Tensor:
        """The sampled images, ``(n, …)``, in the order of the batches."""
        return torch.stack(
            [image for _, image in sorted(self._reservoir, key=lambda item: item[0])]
        )

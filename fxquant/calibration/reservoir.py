"""How many images to measure a loss on, and a uniform choice of them out of batches."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

# Fewer say little about which choice is better; more say little more, and hold more memory at once.
_LEAST, _MOST = 4, 32


def images_for(work: float, each: int) -> int:
    """How many images to measure a loss on: what the work allows, 4 at least and 32 at most.

    Args:
        work: multiplications that may be spent.
        each: that one image takes.
    """
    return min(max(int(work // max(each, 1)), _LEAST), _MOST)


class ReservoirSampler:
    """Keeps ``count`` of the images that pass, each with the same chance (reservoir sampling).

    Args:
        count: how many; 0 keeps none.
        seed: of the choice.
    """

    def __init__(self, count: int, seed: int) -> None:
        self._count, self._random = count, random.Random(seed)
        self._kept: list[tuple[int, Tensor]] = []
        self._seen = 0

    def observe(
        self, batches: Iterable[tuple[Tensor, Tensor | None]]
    ) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Yields the batches as they are."""
        for images, labels in batches:
            for image in images:
                self._observe_image(image)
            yield images, labels

    def _observe_image(self, image: Tensor) -> None:
        place = self._seen
        if len(self._kept) >= self._count:
            place = self._random.randint(0, self._seen)
        if place < self._count:
            self._kept[place : place + 1] = [(self._seen, image.clone())]
        self._seen += 1

    @property
    def images(self) -> Tensor:
        """Those kept, ``(n, …)``, in the order in which they came."""
        return torch.stack([image for _, image in sorted(self._kept, key=lambda item: item[0])])

"""A uniform choice of images out of a stream of batches."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor


class Picked:
    """Keeps ``count`` of the images that pass, each with the same chance (reservoir sampling).

    Args:
        count: how many; 0 keeps none.
        seed: of the choice.
    """

    def __init__(self, count: int, seed: int) -> None:
        self._count, self._random = count, random.Random(seed)
        self._kept: list[tuple[int, Tensor]] = []
        self._seen = 0

    def watch(
        self, batches: Iterable[tuple[Tensor, Tensor | None]]
    ) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Yields the batches as they are."""
        for images, labels in batches:
            for image in images:
                self._offer(image)
            yield images, labels

    def _offer(self, image: Tensor) -> None:
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

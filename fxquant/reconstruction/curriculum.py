"""A curriculum of images: easy images first (AIQViT, arXiv 2502.04628, section 3.3)."""

from __future__ import annotations

import torch
from torch import Tensor


class Curriculum:
    """Draws batches from the share of the images with the smallest losses.

    At step t of T this share is ``min(1, start + (1 - start) t / T)``. A batch is not larger than
    the first share: otherwise, with few images, every step would draw all images.

    Args:
        count: number of images.
        batch: number of images of a batch.
        steps: T.
        start: share at the first step; 1 draws from all images at every step.
        generator: draws the images.
    """

    def __init__(
        self, count: int, batch: int, steps: int, start: float, generator: torch.Generator
    ) -> None:
        self._count, self._batch = count, min(batch, max(1, round(start * count)))
        self._steps, self._start, self._generator = steps, start, generator
        self._order = torch.arange(count)

    @property
    def sorts(self) -> bool:
        """Whether batches depend on the order of the images, and therefore on their losses."""
        return self._start < 1

    def sort(self, losses: Tensor) -> None:
        """Sorts the images by their losses ``(count,)``."""
        self._order = losses.argsort(stable=True).cpu()

    def share(self, step: int) -> float:
        """Share of the images that a step draws from."""
        return min(1.0, self._start + (1 - self._start) * step / self._steps)

    def draw(self, step: int) -> Tensor:
        """Indices of different images, ``(batch,)``."""
        size = max(self._batch, round(self.share(step) * self._count))
        positions = torch.randperm(size, generator=self._generator)[: self._batch]
        return self._order[positions]

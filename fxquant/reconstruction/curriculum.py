"""Which images a training step sees: easy ones first (AIQViT, arXiv 2502.04628, section 3.3)."""

from __future__ import annotations

import torch
from torch import Tensor


class Curriculum:
    """Draws batches from the share of the images with the smallest losses.

    At step t of T that share is ``min(1, start + (1 - start) t / T)``. A batch is not larger than
    the first share: otherwise all steps would draw all images where there are few.

    Args:
        count: number of images.
        batch: images of a batch.
        steps: T.
        start: share at the first step; 1 for all images at all times.
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
        """Whether the order of the images, and so their losses, matter."""
        return self._start < 1

    def sort(self, losses: Tensor) -> None:
        """Puts the images in order of their losses ``(count,)``."""
        self._order = losses.argsort(stable=True).cpu()

    def share(self, step: int) -> float:
        """Share of the images that a step draws from."""
        return min(1.0, self._start + (1 - self._start) * step / self._steps)

    def draw(self, step: int) -> Tensor:
        """Numbers of different images, ``(batch,)``."""
        size = max(self._batch, round(self.share(step) * self._count))
        picked = torch.randperm(size, generator=self._generator)[: self._batch]
        return self._order[picked]

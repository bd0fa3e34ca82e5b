"""Search over a grid of candidates, for many units at once."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def best_index(
    evaluate: Callable[[Tensor], Tensor], count: int, current: Tensor, stride: int
) -> Tensor:
    """For every unit the candidate of least loss, looked for in two passes.

    The first tries every ``stride``-th candidate and the current one, the second all between the
    neighbours of the best. The result is never worse than the current candidate. With a stride of
    1 every candidate is tried.

    Args:
        evaluate: candidates ``(G, *units)``, whole numbers in ``[0, count)``, to losses of the
            same shape.
        count: number of candidates.
        current: ``(*units)``.
        stride: at least 1.

    Returns:
        ``(*units)``.
    """
    points = sorted({*range(0, count, stride), count - 1})
    coarse = torch.tensor(points, device=current.device)
    tried = coarse.view(-1, *[1] * current.ndim).expand(-1, *current.shape)
    tried = torch.cat([current.unsqueeze(0), tried])
    best, loss = _least(tried, evaluate(tried))
    if stride == 1:
        return best
    around = torch.arange(1 - stride, stride, device=current.device)
    around = around[around != 0].view(-1, *[1] * current.ndim)
    near = (best.unsqueeze(0) + around).clamp(0, count - 1)
    second, second_loss = _least(near, evaluate(near))
    return torch.where(second_loss < loss, second, best)


def _least(tried: Tensor, loss: Tensor) -> tuple[Tensor, Tensor]:
    # NaN, as of a product that overflowed, is never the best; the first of equals wins.
    loss = torch.nan_to_num(loss, nan=torch.inf, posinf=torch.inf)
    least, at = loss.min(0, keepdim=True)
    return tried.gather(0, at).squeeze(0), least.squeeze(0)

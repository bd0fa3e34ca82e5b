"""Low-rank approximation of the error of a rounded weight, as seen in a layer's output.

With ``e = W - q(W)`` the error, ``S`` a root of the second moment of the layer's rows and ``D`` the
importance of its outputs, ``D e S = U diag(s) V^T``; the factors ``up = D^-1 U diag(s)`` and
``down = V^T S^-1`` of the first r singular values are the nearest of rank r in the output (LQER,
arXiv 2402.02446, has ``S`` diagonal and no ``D``; SVDQuant, arXiv 2411.05007, neither).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fxquant.search.gptq import damped_factor

# Share of the mean variance that is added to each: rows are a sample, often fewer than channels.
DAMPENING = 0.01


@dataclass(frozen=True)
class Spectrum:
    """The singular values of an error and its directions.

    Attributes:
        up: ``(N, R)``, scaled by the singular values.
        values: ``(R,)``, falling; the square of each is what it adds to the output error.
        down: ``(R, K)``; of the rows it was made from, each gives values of variance one.
    """

    up: Tensor
    values: Tensor
    down: Tensor

    def truncated(self, rank: int) -> Spectrum:
        """The first ``rank`` of them."""
        return Spectrum(self.up[:, :rank], self.values[:rank], self.down[:rank])


def spectrum(
    error: Tensor,
    rows: Tensor,
    importance: Tensor | None = None,
    *,
    dampening: float = DAMPENING,
) -> Spectrum:
    """The spectrum of an error, in the output that it makes behind ``rows``.

    Args:
        error: ``(N, K)``.
        rows: of the layer's input, ``(n, K)``.
        importance: of the outputs, ``(N,)``, positive; None where all are alike.
        dampening: share of the mean variance of a channel that is added to each, at the least.
    """
    root = damped_factor(rows.double().t() @ rows.double() / len(rows), dampening)
    heavy = torch.ones(len(error), device=error.device) if importance is None else importance
    weights = heavy.double().unsqueeze(1)
    left, values, right = torch.linalg.svd(weights * error.double() @ root, full_matrices=False)
    down = torch.linalg.solve_triangular(root, right, upper=False, left=False)
    return Spectrum((left * values / weights).float(), values.float(), down.float())


def share_ranks(
    gains: Mapping[str, Tensor],
    unit_bytes: Mapping[str, int],
    fixed: Mapping[str, int],
    room: float,
) -> dict[str, int]:
    """Ranks that take most out of the error for each byte, within a number of bytes.

    Args:
        gains: layer -> what each rank takes out of the error, falling, ``(R,)``; comparable
            between layers.
        unit_bytes: layer -> bytes that each rank adds.
        fixed: layer -> bytes that its first rank adds besides.
        room: bytes that all may add.

    Returns:
        Layer -> rank, 0 where none is worth its bytes.
    """
    steps = sorted(
        (-float(gain) / unit_bytes[name], name, i)
        for name, own in gains.items()
        for i, gain in enumerate(own.tolist())
        if gain > 0
    )
    ranks = dict.fromkeys(gains, 0)
    for _, name, i in steps:
        cost = unit_bytes[name] + (0 if i else fixed[name])
        # A layer whose next rank found no room gets no later one, which would be worth less.
        if ranks[name] == i and cost <= room:
            ranks[name] += 1
            room -= cost
    return ranks

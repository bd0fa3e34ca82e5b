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

# Share of the mean variance that is added to each variance: rows are a sample, often fewer than
# the channels.
DAMPENING = 0.01


@dataclass(frozen=True)
class Spectrum:
    """Singular values and singular directions of a weight's rounding error.

    Attributes:
        up: output directions, ``(N, R)``, scaled by the singular values.
        values: singular values, ``(R,)``, descending; the square of each is its share of the
            squared output error.
        down: input directions, ``(R, K)``; each maps the rows that the spectrum was computed from
            to values of variance one.
    """

    up: Tensor
    values: Tensor
    down: Tensor

    def truncated(self, rank: int) -> Spectrum:
        """Spectrum of the first ``rank`` singular values alone."""
        return Spectrum(self.up[:, :rank], self.values[:rank], self.down[:rank])


def spectrum(
    error: Tensor,
    rows: Tensor,
    importance: Tensor | None = None,
    *,
    dampening: float = DAMPENING,
) -> Spectrum:
    """Singular value decomposition of a weight's error, measured in the layer's output.

    Args:
        error: error of the weight, ``(N, K)``.
        rows: rows of the layer's input, ``(n, K)``.
        importance: importance of each output, ``(N,)``, positive; None where all are equal.
        dampening: share of the channels' mean variance that is added to each variance; more where
            the matrix is not positive definite otherwise.
    """
    root = damped_factor(rows.double().t() @ rows.double() / len(rows), dampening)
    importance_or_ones = (
        torch.ones(len(error), device=error.device) if importance is None else importance
    )
    weights = importance_or_ones.double().unsqueeze(1)
    left_directions, values, right_directions = torch.linalg.svd(
        weights * error.double() @ root, full_matrices=False
    )
    down = torch.linalg.solve_triangular(root, right_directions, upper=False, left=False)
    return Spectrum((left_directions * values / weights).float(), values.float(), down.float())


def share_ranks(
    gains: Mapping[str, Tensor],
    unit_bytes: Mapping[str, int],
    fixed: Mapping[str, int],
    room: float,
) -> dict[str, int]:
    """Ranks that lower the error most for each byte, within a budget of bytes.

    Args:
        gains: layer -> by how much each rank lowers the error, descending, ``(R,)``; comparable
            between layers.
        unit_bytes: layer -> bytes that each rank adds.
        fixed: layer -> bytes that its first rank adds on top of these.
        room: bytes that all ranks together may add.

    Returns:
        Layer -> rank, 0 where no rank is worth its bytes.
    """
    steps = sorted(
        (-float(gain) / unit_bytes[name], name, i)
        for name, layer_gains in gains.items()
        for i, gain in enumerate(layer_gains.tolist())
        if gain > 0
    )
    ranks = dict.fromkeys(gains, 0)
    for _, name, i in steps:
        cost = unit_bytes[name] + (0 if i else fixed[name])
        # A layer whose next rank did not fit gets no later rank, which would lower the error less.
        if ranks[name] == i and cost <= room:
            ranks[name] += 1
            room -= cost
    return ranks

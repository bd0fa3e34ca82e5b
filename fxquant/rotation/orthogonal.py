"""Random orthogonal matrices, and those among them that keep the mean of a vector.

``mean_preserving`` is ``Q = H diag(1, R) H``: ``H`` is the Householder reflection that takes the
first unit vector to ``1 / sqrt(width)`` times the vector of ones, ``R`` a random orthogonal matrix
of one row less. ``Q 1 = 1``, therefore ``mean(Q x) = mean(x)``, and a LayerNorm without weight and
bias commutes with ``Q``.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Largest deviation from an exact property that rounding in float64 explains, with a wide margin.
_TOLERANCE = 1e-9


def orthogonal(width: int, seed: int) -> Tensor:
    """A random orthogonal matrix, distributed uniformly.

    The signs of the triangular factor make the QR decomposition unique (Mezzadri, arXiv
    math-ph/0609050, section 5).

    Args:
        width: number of rows and columns, at least 1.
        seed: seed of the draw.

    Returns:
        ``(width, width)`` in float64 on the CPU.
    """
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(width, width, generator=generator, dtype=torch.float64)
    q, r = torch.linalg.qr(normal)
    matrix: Tensor = (q * torch.where(r.diagonal() < 0, -1.0, 1.0)).contiguous()
    _check_orthogonal(matrix)
    return matrix


def mean_preserving(width: int, seed: int) -> Tensor:
    """A random orthogonal matrix that maps the vector of ones to itself.

    Args:
        width: number of rows and columns, at least 2.
        seed: seed of the draw.

    Returns:
        ``(width, width)`` in float64 on the CPU.
    """
    normal = torch.full((width,), -(width**-0.5), dtype=torch.float64)
    normal[0] += 1.0
    reflection = torch.eye(width, dtype=torch.float64)
    reflection -= 2.0 / (normal @ normal) * torch.outer(normal, normal)
    middle = torch.eye(width, dtype=torch.float64)
    middle[1:, 1:] = orthogonal(width - 1, seed)
    matrix = reflection @ middle @ reflection
    _check_orthogonal(matrix)
    error = float((matrix.sum(1) - 1.0).abs().max())
    assert error < _TOLERANCE, f"rows sum to one up to {error:.1e}"
    return matrix


def signed_hadamard(width: int, seed: int) -> Tensor:
    """A Hadamard matrix with random signs of its columns, divided by the root of its width.

    Args:
        width: number of rows and columns, a power of two.
        seed: seed of the signs.

    Returns:
        ``(width, width)`` in float64 on the CPU, an orthogonal matrix.
    """
    matrix = torch.ones(1, 1, dtype=torch.float64)
    pair = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    while len(matrix) < width:
        matrix = torch.kron(pair, matrix)
    generator = torch.Generator().manual_seed(seed)
    signs = 1.0 - 2.0 * torch.randint(2, (width,), generator=generator, dtype=torch.float64)
    matrix *= signs / width**0.5
    _check_orthogonal(matrix)
    return matrix


def _check_orthogonal(matrix: Tensor) -> None:
    identity = torch.eye(len(matrix), dtype=matrix.dtype)
    error = float((matrix @ matrix.T - identity).abs().max())
    assert error < _TOLERANCE, f"the matrix is orthogonal up to {error:.1e}"

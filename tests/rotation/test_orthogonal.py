"""Random orthogonal matrices, and those that keep the mean."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from fxquant.rotation.orthogonal import mean_preserving, orthogonal, signed_hadamard

widths, seeds = st.integers(2, 48), st.integers(0, 2**31)


@given(width=st.integers(1, 48), seed=seeds)
def test_matrices_are_orthogonal(width: int, seed: int) -> None:
    matrix = orthogonal(width, seed)
    assert matrix.dtype == torch.float64 and matrix.is_contiguous()
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(width, dtype=torch.float64))


@given(width=widths, seed=seeds)
def test_the_vector_of_ones_stays(width: int, seed: int) -> None:
    matrix, ones = mean_preserving(width, seed), torch.ones(width, dtype=torch.float64)
    torch.testing.assert_close(matrix @ ones, ones)
    torch.testing.assert_close(matrix.T @ ones, ones)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(width, dtype=torch.float64))


@given(width=widths, seed=seeds, copies=st.integers(1, 4))
def test_layer_norm_commutes(width: int, seed: int, copies: int) -> None:
    matrix = torch.block_diag(*[mean_preserving(width, seed)] * copies)
    x = torch.randn(3, width * copies, dtype=torch.float64)
    size = [width * copies]
    expected = F.layer_norm(x, size) @ matrix.T
    torch.testing.assert_close(F.layer_norm(x @ matrix.T, size), expected, rtol=1e-6, atol=1e-6)


@given(power=st.integers(0, 6), seed=seeds)
def test_signed_hadamard_matrices_are_orthogonal(power: int, seed: int) -> None:
    width = 2**power
    matrix = signed_hadamard(width, seed)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(width, dtype=torch.float64))
    torch.testing.assert_close(matrix.abs(), torch.full_like(matrix, width**-0.5))


def test_the_seed_decides() -> None:
    assert torch.equal(mean_preserving(8, 3), mean_preserving(8, 3))
    assert not torch.allclose(mean_preserving(8, 3), mean_preserving(8, 4))
    assert not torch.allclose(signed_hadamard(8, 3), signed_hadamard(8, 4))


def test_channels_are_mixed() -> None:
    largest = mean_preserving(64, 0).abs().max()
    assert float(largest) < 0.6, "a channel is left almost alone"

"""Laws of rounding by columns and of the ridge update."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fxquant.config.spec import Granularity, TensorSpec
from fxquant.quantizers import UniformQuantizer
from fxquant.search.gptq import Moments, ridge_update, round_weight

SEEDS = st.integers(0, 1000)


def coder(weight: Tensor, bits: int) -> UniformQuantizer:
    spec = TensorSpec(bits=bits, symmetric=True, granularity=Granularity.CHANNEL)
    return UniformQuantizer.from_range(weight.amin(1), weight.amax(1), spec, 0)


def correlated(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    mixed = torch.randn(columns, columns, generator=generator)
    return torch.randn(rows, columns, generator=generator) @ mixed + 3


def moments(x: Tensor, y: Tensor, parts: int = 2) -> Moments:
    found = Moments(x.shape[1], y.shape[1], x.device)
    for rows in zip(x.chunk(parts), y.chunk(parts), strict=True):
        found.add(*rows)
    return found


@given(SEEDS, st.integers(2, 8), st.sampled_from([3, 20, 150]))
def test_columns_make_up_for_one_another(seed: int, bits: int, columns: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = correlated(4 * columns, columns, generator)
    weight = torch.randn(6, columns, generator=generator)
    quantizer = coder(weight, bits)
    seen = moments(x, x @ weight.T)
    rounded = round_weight(weight, seen.covariance, quantizer, 0.01)
    assert torch.equal(quantizer(rounded.latent), rounded.values)
    if columns > 3:  # among few columns a greedy order may lose
        assert seen.error(rounded.values) < seen.error(quantizer(weight))


@given(SEEDS)
def test_moments_are_those_of_the_rows(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = correlated(40, 5, generator) + 100
    y = torch.randn(40, 3, generator=generator) - 50
    weight = torch.randn(3, 5, generator=generator)
    found = moments(x, y, 4)
    assert torch.allclose(found.mean_x, x.double().mean(0))
    assert torch.allclose(found.covariance, x.double().T.cov(correction=0), rtol=1e-4, atol=1e-4)
    left = y.double() - x.double() @ weight.double().T
    expected = (left - left.mean(0)).square().sum(1).mean()
    assert abs(found.error(weight) - float(expected)) < 1e-3 * float(expected)


@given(SEEDS)
def test_dead_and_equal_columns_are_harmless(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = correlated(64, 12, generator)
    x[:, 3], x[:, 5], x[:, 7] = 0.0, x[:, 6], -2.0
    weight = torch.randn(64, 12, generator=generator)  # one row may lose: the choice is greedy
    quantizer = coder(weight, 4)
    seen = moments(x, x @ weight.T)
    rounded = round_weight(weight, seen.covariance, quantizer, 1e-6)
    assert bool(rounded.values.isfinite().all())
    assert seen.error(rounded.values) <= seen.error(quantizer(weight))


def test_inputs_that_are_all_alike_change_nothing() -> None:
    weight = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    quantizer = coder(weight, 4)
    x = torch.full((10, 6), 2.0)
    rounded = round_weight(weight, moments(x, x @ weight.T).covariance, quantizer, 0.01)
    assert torch.equal(rounded.values, quantizer(weight))


@given(SEEDS, st.floats(0.0, 1.0))
def test_the_ridge_only_changes_what_holds_elsewhere(seed: int, noise: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(3, 8, generator=generator)
    x = correlated(400, 8, generator)
    y = x @ weight.T
    # Inputs are shrunk, as a range too small does, which a larger weight makes up for.
    seen = 0.7 * x + noise * torch.randn(x.shape, generator=generator)
    parts = [moments(*rows) for rows in zip(seen.chunk(4), y.chunk(4), strict=True)]
    whole = moments(seen, y)
    found, left = ridge_update(weight, parts, whole)
    assert left < 1
    assert whole.error(found) < whole.error(weight)


def test_the_ridge_leaves_what_no_change_improves() -> None:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(3, 30, generator=generator)
    x = torch.randn(36, 30, generator=generator)
    y = x @ weight.T + torch.randn(36, 3, generator=generator)  # errors that x does not explain
    parts = [moments(*rows, 1) for rows in zip(x.chunk(4), y.chunk(4), strict=True)]
    found, left = ridge_update(weight, parts, moments(x, y))
    if left == 1:
        assert torch.equal(found, weight.double())
    else:
        assert left > 0.9

"""The nearest low-rank matrix to a weight's error, and ranks within a number of bytes."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fxquant.config.low_rank import LowRank
from fxquant.config.scale_search import Metric
from fxquant.config.spec import TensorSpec
from fxquant.errors import BitWidthError, PolicyError
from fxquant.policies.policy import Policy, Rule
from fxquant.search.low_rank import share_ranks, spectrum
from tests.helpers.refusals import refused

sizes = st.integers(1, 9)
seeds = st.integers(0, 99)


def drawn(n: int, k: int, rows: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """An error ``(n, k)``, rows of channels that differ and go together, and importances."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(k, k, generator=generator)
    x = torch.randn(rows, k, generator=generator) @ mix + 1
    return (
        torch.randn(n, k, generator=generator),
        x,
        torch.rand(n, generator=generator) + 0.1,
    )


def output_error(error: Tensor, rows: Tensor, importance: Tensor) -> float:
    return float(((rows @ error.t()) * importance).double().square().sum() / len(rows))


@given(n=sizes, k=sizes, rows=st.integers(1, 30), seed=seeds, weighted=st.booleans())
def test_at_full_rank_nothing_of_the_error_is_left(
    n: int, k: int, rows: int, seed: int, weighted: bool
) -> None:
    error, x, importance = drawn(n, k, rows, seed)
    found = spectrum(error, x, importance if weighted else None)
    assert found.values.shape == (min(n, k),)
    torch.testing.assert_close(found.up @ found.down, error, rtol=0, atol=1e-5)
    exact, restored = x @ error.t(), x @ (found.up @ found.down).t()
    assert float((restored - exact).abs().max()) <= 1e-5 * float(exact.abs().max())


@given(n=sizes, k=sizes, seed=seeds)
def test_each_rank_takes_its_square_out_of_the_output_error(n: int, k: int, seed: int) -> None:
    error, x, importance = drawn(n, k, 40, seed)
    found = spectrum(error, x, importance, dampening=0.0)
    left = output_error(error, x, importance)
    whole = left
    for rank in range(1, len(found.values) + 1):
        part = found.truncated(rank)
        after = output_error(error - part.up @ part.down, x, importance)
        expected = left - float(found.values[rank - 1]) ** 2
        assert after == pytest.approx(expected, abs=1e-4 * whole)
        left = after


@given(seed=seeds, rank=st.integers(1, 5))
def test_no_other_matrix_of_that_rank_is_nearer(seed: int, rank: int) -> None:
    error, x, importance = drawn(6, 7, 40, seed)
    part = spectrum(error, x, importance, dampening=0.0).truncated(rank)
    best = output_error(error - part.up @ part.down, x, importance)
    plain = torch.linalg.svd(error)
    other = plain.U[:, :rank] * plain.S[:rank] @ plain.Vh[:rank]
    moved = (part.up + 0.1 * torch.randn(6, rank)) @ part.down
    assert best <= output_error(error - other, x, importance) * (1 + 1e-5)
    assert best < output_error(error - moved, x, importance)


def test_values_between_the_factors_are_of_one_size() -> None:
    """They share one scale; a channel smaller than the others would be rounded away."""
    error, x, _ = drawn(8, 8, 400, 0)
    between = x @ spectrum(error, x, dampening=0.0).down.t()
    torch.testing.assert_close(between.square().mean(0), torch.ones(8), rtol=1e-3, atol=0)


def test_ranks_go_where_they_gain_most_for_each_byte() -> None:
    gains = {"a": torch.tensor([9.0, 4.0, 1.0]), "b": torch.tensor([8.0, 5.0, 0.0])}
    costs = {"a": 10, "b": 10}
    free = dict.fromkeys(gains, 0)
    assert share_ranks(gains, costs, free, 9) == {"a": 0, "b": 0}
    assert share_ranks(gains, costs, free, 20) == {"a": 1, "b": 1}
    assert share_ranks(gains, costs, free, 30) == {"a": 1, "b": 2}
    assert share_ranks(gains, costs, free, 1000) == {"a": 3, "b": 2}  # the last gains nothing
    assert share_ranks(gains, {"a": 40, "b": 10}, free, 40) == {"a": 0, "b": 2}


def test_the_first_rank_of_a_layer_also_pays_what_it_adds_once() -> None:
    gains = {"a": torch.tensor([9.0, 4.0]), "b": torch.tensor([8.0, 5.0])}
    costs = {"a": 10, "b": 10}
    assert share_ranks(gains, costs, {"a": 5, "b": 5}, 24) == {"a": 1, "b": 0}
    assert share_ranks(gains, costs, {"a": 25, "b": 5}, 29) == {"a": 0, "b": 2}


@given(room=st.integers(0, 200), seed=seeds)
def test_ranks_keep_within_the_bytes(room: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    gains = {str(i): torch.rand(5, generator=generator).sort().values.flip(0) for i in range(4)}
    costs = {str(i): 3 + i for i in range(4)}
    fixed = {str(i): 7 * i for i in range(4)}
    ranks = share_ranks(gains, costs, fixed, room)
    spent = sum(rank * costs[name] + fixed[name] * (rank > 0) for name, rank in ranks.items())
    assert spent <= room
    assert room < sum(costs.values()) * 5 + sum(fixed.values()) or set(ranks.values()) == {5}


@pytest.mark.parametrize(
    ("sizes", "text"),
    [
        ({"rank": 0}, "^rank must be a positive number, got 0"),
        ({"rank": True}, None),
        ({"share": -1}, "^share must be a positive number, got -1"),
        ({"share": "10%"}, None),
        ({"share": math.nan}, None),
    ],
)
def test_wrong_sizes_are_refused(sizes: dict[str, object], text: str | None) -> None:
    (size,) = sizes.values()
    with refused(PolicyError, text, got=size, expected="a positive number"):
        LowRank(**sizes)


@pytest.mark.parametrize("sizes", [(None, None), (4, 0.1)])
def test_sizes_are_either_ranks_or_shares(sizes: tuple[int | None, float | None]) -> None:
    rank, share = sizes
    text = "either a rank for every layer or a share" if rank is None else None
    with refused(PolicyError, text, got=sizes, expected="a rank or a share"):
        LowRank(rank=rank, share=share)


def test_ranks_are_whole_numbers_or_below_one() -> None:
    text = "a share below 1 of the channels, got 1.5"
    with refused(PolicyError, text, got=1.5, expected="a whole number, or a share below 1"):
        LowRank(rank=1.5)


@pytest.mark.parametrize(
    ("bits", "expected", "text"),
    [
        (1, "2..8", r"^bits of a branch must be in 2\.\.8, got 1$"),
        (9, "2..8", None),
        (4.0, int, r"^bits must be an integer, got 4\.0$"),
        (True, int, None),
    ],
)
def test_wrong_widths_are_refused(bits: object, expected: object, text: str | None) -> None:
    with refused(BitWidthError, text, got=bits, expected=expected):
        LowRank(rank=4, bits=bits)


def test_a_policy_with_branches_samples_rows() -> None:
    rules = (Rule(spec=TensorSpec()),)
    assert Policy(name="p", rules=rules).samples is None
    branches = Policy(name="p", rules=rules, low_rank=LowRank(rank=2))
    assert branches.samples is not None and branches.samples.metric is Metric.MSE
    with refused(PolicyError, got=4, expected=(LowRank, None)):
        Policy(name="p", rules=rules, low_rank=4)

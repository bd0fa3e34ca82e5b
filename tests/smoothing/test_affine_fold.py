"""The affine fold behind a norm: where it is exact, that it is, and the ranges it needs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from fxquant.config.vocabulary import Stage
from fxquant.errors import BatchError, CalibrationError, NonFiniteError, PassError
from fxquant.graph.capture import capture
from fxquant.smoothing.affine_fold import fold
from fxquant.smoothing.channel_ranges import norm_ranges
from fxquant.smoothing.fold_sites import norm_sites
from fxquant.testing import DIM, TOKENS, assert_same_function, seeded, tokens
from tests.helpers.norms import Norm, Read, both, linear_inputs, padded, site_of
from tests.helpers.refusals import refused

# The fold


@settings(max_examples=10)
@given(
    seed=st.integers(0, 99),
    spread=st.floats(0.0, 5.0),
    shifts=st.booleans(),
    bias=st.booleans(),
)
def test_the_fold_keeps_the_function(seed: int, spread: float, shifts: bool, bias: bool) -> None:
    model = seeded(Norm(both, nn.LayerNorm(DIM, bias=bias)), seed)
    gm = capture(model, tokens())
    before = linear_inputs(gm, tokens())[0]
    divide = (spread * torch.randn(DIM)).exp()
    shift = shifts * spread * torch.randn(DIM)
    fold(gm, site_of(gm), divide, shift)
    gm.recompile()
    after = linear_inputs(gm, tokens())[0]
    torch.testing.assert_close(after, (before - shift) / divide, rtol=1e-4, atol=1e-5)
    assert_same_function(gm, model, tokens(), 1e-5 * (1 + spread))


@pytest.mark.parametrize(
    "read",
    [
        lambda m, y: m.one(y.roll((1, 2), (0, 1)).transpose(0, 1)),
        lambda m, y: m.one(y.unflatten(-1, (2, 4)).flatten(2)),
        lambda m, y: m.one(y[:, 1:3].reshape(-1, DIM)) * m.two(y[:, 0])[:, None, :1].sum(),
        lambda m, y: m.one(y.unsqueeze(1).expand(-1, 2, -1, -1).permute(2, 1, 0, 3)),
        lambda m, y: m.one(y.permute(2, 0, 1).flatten(1).transpose(0, -1)),
        lambda m, y: m.one(y.split(2, 1)[1].contiguous()),
        lambda m, y: m.one(y.chunk(2, 1)[1]) + m.two(y.unbind(1)[0])[:, None],
        lambda m, y: m.one(F.pad(y, (0, 0, 1, 1))[:, 1:-1]),
    ],
    ids=["rolled", "viewed", "cut", "expanded", "there and back", "split", "chunks", "cropped pad"],
)
def test_moves_that_keep_the_channels(read: Read) -> None:
    model = seeded(Norm(read))
    gm = capture(model, tokens())
    assert site_of(gm).shiftable
    fold(gm, site_of(gm), torch.rand(DIM) + 0.5, torch.randn(DIM))
    gm.recompile()
    assert_same_function(gm, model, tokens())


@pytest.mark.parametrize(
    ("divide", "shift", "expected", "reason"),
    [
        (torch.zeros(DIM), torch.zeros(DIM), "> 0", "divided by a number above zero"),
        (torch.ones(DIM), torch.ones(DIM), "zeros", "cannot be shifted"),
        (torch.ones(DIM - 1), torch.zeros(DIM), (DIM,), r"divide must be \(8,\) finite numbers"),
        (torch.ones(DIM), torch.full((DIM,), torch.nan), (DIM,), "shift must be"),
    ],
)
def test_values_that_the_fold_cannot_take(
    divide: Tensor, shift: Tensor, expected: object, reason: str
) -> None:
    gm = capture(seeded(Norm(padded)), tokens())
    with refused(PassError, f"layer_norm.*{reason}", edge="layer_norm", expected=expected):
        fold(gm, site_of(gm), divide, shift)


@pytest.mark.parametrize(
    ("read", "norm", "reason"),
    [
        (lambda m, y: m.one(y) + y.sum(), None, "sum_1 (sum) reads it too, and is not a linear"),
        (lambda m, y: (m.one(y), y.flatten(1)), None, "the model outputs it too"),
        (
            lambda m, y: m.one(y),
            nn.LayerNorm((TOKENS, DIM)),
            "it normalises over 2 axes, and a linear reads one",
        ),
        (
            lambda m, y: m.one(y),
            nn.LayerNorm(DIM, elementwise_affine=False),
            "it has no weight to fold into",
        ),
        (
            lambda m, y: m.one(F.layer_norm(y, (DIM,), y[0, 0], m.own[0])),
            nn.Identity(),
            "its weight or bias is computed",
        ),
        (
            lambda m, y: F.linear(y, m.own * y.mean()),
            None,
            "mean (mean) reads it too, and is not a linear",
        ),
        (
            lambda m, y: F.linear(m.norm(y.sin()), m.own * y[0, 0].tanh()),
            nn.LayerNorm(DIM),
            "the weight or bias of linear is computed",
        ),
        (lambda m, y: F.linear(y[0], y[1]), None, "the weight or bias of linear is computed"),
        (
            lambda m, y: m.one(y.flip(-1)) + m.two(y),
            None,
            "flip (flip) reads it too, and is not a linear",
        ),
        (
            lambda m, y: m.one(y.roll(1, -1)),
            None,
            "its channels do not stay in order on the last axis on their way to linear",
        ),
        (
            lambda m, y: m.one(y.transpose(1, 2).reshape(-1, TOKENS, DIM)),
            None,
            "its channels do not stay in order on the last axis on their way to linear",
        ),
        (
            lambda m, y: m.one(F.pad(y, (0, 0, 1, 1), value=1.0)),
            None,
            "its channels do not stay in order on the last axis on their way to linear",
        ),
    ],
)
def test_a_fold_that_is_not_exact_is_refused(
    read: Read, norm: nn.Module | None, reason: str
) -> None:
    gm = capture(seeded(Norm(read, norm)), tokens())
    assert reason in {str(site) for _, site in norm_sites(gm)}


def test_a_norm_that_feeds_no_linear_is_no_site() -> None:
    gm = capture(seeded(Norm(lambda m, y: y + m.one(y.sin()).sum())), tokens())
    assert list(norm_sites(gm)) == []


# Ranges


def test_ranges_are_those_of_what_linears_read() -> None:
    model = seeded(Norm(lambda m, y: m.one(y[:, 1:2]) + m.two(y[:, 2:3])))
    gm = capture(model, tokens())
    batches = [tokens(2), tokens(3)]
    ((name, (lo, hi)),) = norm_ranges(gm, iter(batches)).items()
    read = torch.cat([model.norm(x)[:, 1:3] for x in batches]).flatten(0, 1)
    assert name == "layer_norm"
    torch.testing.assert_close((lo, hi), tuple(torch.aminmax(read.detach(), dim=0)))


def test_ranges_of_a_graph_without_sites_need_no_data() -> None:
    assert norm_ranges(capture(seeded(nn.Linear(DIM, DIM)), tokens()), []) == {}


def test_ranges_tell_what_is_wrong_with_the_data() -> None:
    gm = capture(seeded(Norm(both)), tokens())
    with refused(NonFiniteError, edge="norm"):
        norm_ranges(gm, [tokens() * torch.nan])
    with refused(CalibrationError, edge="norm", got=None):
        norm_ranges(gm, [])
    with refused(BatchError, r"does not accept a batch of shape \(2, 3\)", got=(2, 3)):
        norm_ranges(gm, [torch.zeros(2, 3)])
    gm.meta["stage"] = Stage.OBSERVED
    text = "measured in stage FLOAT, got OBSERVED"
    with refused(PassError, text, got=Stage.OBSERVED, expected=Stage.FLOAT):
        norm_ranges(gm, [tokens()])

"""SQ-b: where channels fold into linears, that the fold is exact, and what is chosen."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch.nn import functional as F

import fxquant
from fxquant import Policy, Rule, TensorSpec, policies
from fxquant.calibration.observe import observe
from fxquant.config.scale_search import Metric, ScaleSearch
from fxquant.config.vocabulary import Arg
from fxquant.passes import SmoothWithBias, run_passes
from fxquant.search.product_loss import ProductSample
from fxquant.smoothing import candidates as smoothing
from fxquant.smoothing.affine_fold import fold
from fxquant.smoothing.candidates import (
    ConsumerSample,
    Smoothing,
    TrialFold,
    finalists,
    folded_sample,
)
from fxquant.smoothing.choose import FoldDecisions, choose_smoothing
from fxquant.smoothing.fold_sites import Site, linear_sites, norm_sites
from fxquant.testing import DIM, Block, assert_same_function, op_names, seeded, tokens
from fxquant.utils.notes import Refusal
from tests.helpers.stages import annotated, canonical
from tests.helpers.zoo import FAMILIES, Family

FOUR = TensorSpec(bits=4)
WEIGHT = TensorSpec(bits=4, symmetric=True, granularity="channel")
HEAD = TensorSpec(bits=4, symmetric=True, granularity="head")


def sites(gm: fx.GraphModule) -> Iterator[Site]:
    for _, site in (*norm_sites(gm), *linear_sites(gm)):
        if isinstance(site, Site):
            yield site


class Attention(nn.Module):
    """One head of attention and its output projection."""

    def __init__(self, share: nn.Module | None = None) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(DIM, DIM) for _ in range(3))
        self.share, self.proj = share or nn.Softmax(-1), nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        scores = self.q(x) @ self.k(x).transpose(1, 2)
        return self.proj(self.share(scores) @ self.v(x))


# Sites


def test_values_fold_into_the_output_projection() -> None:
    gm = canonical(seeded(Attention()), tokens(), seed=False)
    ((source, site),) = linear_sites(gm)  # neither q nor k, whose channels the scores sum over
    assert isinstance(site, Site)
    assert (source.name, site.shiftable) == ("v", True)
    assert [node.name for node in (*site.linears, *site.products)] == ["proj", "matmul_1"]


@pytest.mark.parametrize("share", [nn.ReLU(), nn.Softmax(1)], ids=["no shares", "of columns"])
def test_only_an_average_can_be_shifted(share: nn.Module) -> None:
    ((_, site),) = linear_sites(canonical(seeded(Attention(share)), tokens(), seed=False))
    assert isinstance(site, Site)
    assert not site.shiftable


def test_channels_that_are_summed_do_not_fold() -> None:
    class Summed(Attention):
        def forward(self, x: Tensor) -> Tensor:
            return self.proj(self.q(x) @ self.k(x).transpose(1, 2)[:, :, :DIM])

    model = seeded(Summed())
    gm = canonical(model, torch.randn(2, DIM, DIM), seed=False)
    found = dict(linear_sites(gm))
    reasons = [str(site) for site in found.values() if isinstance(site, Refusal)]
    assert reasons == ["its channels do not stay on the last axis on their way to matmul"]


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_every_fold_of_every_family_is_exact(family: Family) -> None:
    torch.manual_seed(1)
    model, x = family.model(), torch.randn(2, *family.image)
    gm = canonical(model, x, seed=False)
    count = 0
    for site in list(sites(gm)):
        channels = int(site.source.meta["val"].shape[-1])
        shift = torch.randn(channels) if site.shiftable else torch.zeros(channels)
        fold(gm, site, (0.5 * torch.randn(channels)).exp(), 0.5 * shift)
        count += 1
    gm.recompile()
    with torch.no_grad():
        before, after = model(x), gm(x)
    assert (count > 0) == (family.name != "levit_128s")  # hardswish stands before its projections
    # In float32, as it is deployed.
    assert float((after - before).norm() / before.norm()) < 1e-5


# The search


def linear_sample(seed: int, outliers: float = 1.0) -> ProductSample:
    torch.manual_seed(seed)
    lhs = torch.randn(1, 1, 64, DIM) + torch.randn(DIM)
    lhs[..., 0] *= outliers
    return ProductSample(lhs, torch.randn(1, 1, DIM, 6), None, channels=True)


def value_sample(seed: int) -> ProductSample:
    torch.manual_seed(seed)
    shares = torch.randn(3, 2, 5, 7).softmax(-1)
    return ProductSample(shares, torch.randn(3, 2, 7, DIM // 2) + 1, torch.randn(3, 2, 5, 4))


@settings(max_examples=20)
@given(seed=st.integers(0, 99), left=st.booleans())
def test_a_moved_product_differs_by_a_constant(seed: int, left: bool) -> None:
    sample = linear_sample(seed) if left else value_sample(seed)
    smoothing = Smoothing(torch.rand(DIM) + 0.5, torch.randn(DIM), "any")
    after = folded_sample(sample, smoothing, left=left)
    exact, found = sample.lhs @ sample.rhs, after.lhs @ after.rhs
    if left:
        constant = smoothing.shift @ sample.rhs[0, 0]
        torch.testing.assert_close(found + constant, exact, rtol=1e-4, atol=1e-4)
    else:
        divide, shift = (x.view(2, 1, -1) for x in (smoothing.divide, smoothing.shift))
        torch.testing.assert_close(found * divide + shift, exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shiftable", [True, False])
def test_finalists(shiftable: bool) -> None:
    readings = [ConsumerSample(linear_sample(0, 20.0), FOUR, WEIGHT, left=True)]
    found = finalists(readings, Metric.MSE, shiftable=shiftable)
    assert found[0].name == "as it is"
    assert bool((found[0].divide == 1).all())
    assert not bool(found[0].shift.any())
    assert len(found) == (5 if shiftable else 2)
    assert shiftable == any(bool(one.shift.any()) for one in found)
    errors = [TrialFold(readings, one, Metric.MSE).error for one in found]
    assert min(errors[1:]) < 0.5 * errors[0]  # one channel takes 20 times the range of the others


# Largest ratio among seeds 0..999 with each outlier: 1.254 (seed 785, outlier 1). 49 of these 3000
# cases are above 1.1, the mean is 1.007, the median 1.
_MAX_RATIO_OF_FEW = 1.3


@settings(max_examples=10)
@given(st.integers(0, 999), st.sampled_from([1.0, 5.0, 20.0]))
@example(5, 5.0)  # 1.103
@example(785, 1.0)
def test_few_exponents_come_near_the_best_of_all(seed: int, outlier: float) -> None:
    readings = [ConsumerSample(linear_sample(seed, outlier), FOUR, WEIGHT, left=True)]
    _, found = finalists(readings, Metric.MSE, shiftable=False)
    error = TrialFold(readings, found, Metric.MSE).error
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(smoothing, "_NEIGHBOURS", ())
        _, coarse = finalists(readings, Metric.MSE, shiftable=False)
        patch.setattr(smoothing, "_COARSE", range(21))
        _, best = finalists(readings, Metric.MSE, shiftable=False)
    least = TrialFold(readings, best, Metric.MSE).error
    assert least <= error <= TrialFold(readings, coarse, Metric.MSE).error
    assert error < _MAX_RATIO_OF_FEW * least


def test_a_channel_that_never_varies_stays_finite() -> None:
    sample = linear_sample(0)
    sample.lhs[..., 2] = 0.0
    readings = [ConsumerSample(sample, FOUR, WEIGHT, left=True)]
    for one in finalists(readings, Metric.MSE, shiftable=True):
        assert bool((torch.isfinite(one.divide) & (one.divide > 0)).all())


def test_a_trial_computes_what_the_folded_product_would() -> None:
    sample, value = linear_sample(3), value_sample(3)
    smoothing = Smoothing(torch.rand(DIM) + 0.5, torch.randn(DIM), "any")
    wide = TensorSpec(bits=16), TensorSpec(bits=16, symmetric=True, granularity="channel")
    heads = TensorSpec(bits=16, symmetric=True, granularity="head")
    trial = TrialFold(
        [
            ConsumerSample(sample, wide[0], wide[1], left=True),
            ConsumerSample(value, heads, None, left=False),
        ],
        smoothing,
        Metric.MSE,
    )
    x, weight, bias = sample.lhs[0, 0], sample.rhs[0, 0].t(), torch.randn(6)
    exact = F.linear(x, weight, bias)
    torch.testing.assert_close(trial.overrides[0](x, weight, bias), exact, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(
        trial.overrides[1](value.lhs, value.rhs), value.lhs @ value.rhs, rtol=1e-2, atol=1e-2
    )


# The whole


def outlying(model: nn.Module, factor: float) -> nn.Module:
    """The same function with channels behind each norm that are far larger than the others."""
    with torch.no_grad():
        for block in model.blocks:
            for norm, linear in ((block.norm1, block.attn.qkv), (block.norm2, block.mlp.fc1)):
                norm.weight[:6] *= factor
                norm.bias[:6] *= factor
                linear.weight[:, :6] /= factor
    return model


def divergence(policy: Policy, model: nn.Module, images: Tensor, calib: Tensor) -> float:
    compiled = fxquant.compile(model, [calib], policy)
    with torch.no_grad():
        exact, found = model(images).log_softmax(1), compiled(images).log_softmax(1)
    return float(F.kl_div(found, exact, log_target=True, reduction="batchmean"))


@pytest.mark.slow
def test_outlying_channels_are_smoothed_away() -> None:
    images = torch.randn(48, *FAMILIES[0].image)
    model, plain = outlying(FAMILIES[0].model(), 40.0), policies.ptq4vit(6, 6, twin=False)
    losses = [
        divergence(policy, model, images[32:], images[:32])
        for policy in (plain, replace(plain, smooth=True))
    ]
    assert losses[1] < 0.2 * losses[0]


def test_choices_say_why_a_site_stays() -> None:
    gm, _ = annotated(Rule(arg=Arg.WEIGHT, spec=WEIGHT))
    choices = choose_smoothing(gm, [(tokens(8), None)], ScaleSearch(rows=32))
    assert not choices.folds
    assert choices.refused
    assert all("stays float" in reason for reason in choices.refused.values())


def test_the_pass_folds_what_was_chosen_and_moves_the_samples() -> None:
    rules = (
        Rule(arg=Arg.WEIGHT, spec=WEIGHT),
        Rule(arg=Arg.RHS, spec=HEAD),
        Rule(spec=TensorSpec(bits=3)),
    )
    model = seeded(Block())
    with torch.no_grad():
        model.norm1.weight[0] *= 50
    gm, _ = annotated(*rules, model=model, seed=False)
    batches = [(tokens(8), None)]
    search = ScaleSearch(rows=64, metric=Metric.FISHER, loss="gaussian")
    choices = choose_smoothing(gm, batches, search)
    assert choices.folds
    result = run_passes(gm, [SmoothWithBias(choices)])["SmoothWithBias"]
    assert result.changed == len(choices.folds) == len(result.comparisons)
    assert all(gain.error_ratio <= 0.5 for gain in result.comparisons)
    found = gm(tokens(4))
    assert run_passes(gm, [SmoothWithBias(choices)])["SmoothWithBias"].changed == 0
    assert torch.equal(gm(tokens(4)), found)
    assert_same_function(gm, model, tokens(4))
    drawn = observe(gm, batches, search).samples
    assert drawn.keys() == choices.samples.keys()
    for name, sample in choices.samples.items():
        torch.testing.assert_close(sample.lhs, drawn[name].lhs, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(sample.rhs, drawn[name].rhs, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(sample.gradient, drawn[name].gradient, rtol=1e-3, atol=1e-3)


def test_nothing_chosen_changes_nothing() -> None:
    gm, _ = annotated(Rule(spec=FOUR))
    names = op_names(gm)
    result = run_passes(gm, [SmoothWithBias(FoldDecisions({}, {"norm": "not smoothed: why"}, {}))])
    assert result["SmoothWithBias"].changed == 0
    assert result["SmoothWithBias"].notes[0].reason == "not smoothed: why"
    assert op_names(gm) == names
    assert_same_function(gm, seeded(Block()), tokens())

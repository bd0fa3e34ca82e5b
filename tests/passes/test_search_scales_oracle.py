"""The search of scales against brute force, and its metric against the loss of the network."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import cache
from itertools import pairwise

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from fxquant import policies, testing
from fxquant.calibration.observe import observe
from fxquant.config.scale_search import Metric, ScaleSearch
from fxquant.config.spec import Granularity, TensorSpec
from fxquant.demo.glyphs import GlyphDataset
from fxquant.demo.models import build
from fxquant.passes import AssignSpecs, Freeze, InsertObservers, SearchScales, run_passes
from fxquant.policies.policy import Policy, Rule
from fxquant.quantizers import TwinUniformQuantizer, UniformQuantizer
from fxquant.testing import DIM, images
from tests.helpers.brute_force import BruteForce, quantizers
from tests.helpers.stages import FrozenSamples, canonical, frozen_with_samples, with_observers

EVERY_POINT = ScaleSearch(rows=10_000, stride=1)


class Vit(nn.Module):
    """Grouped patches, a block, a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(4, DIM, 4, 4, groups=2)
        self.block, self.head = testing.Block(), nn.Linear(DIM, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.block(self.patches(F.pad(x, (0, 0, 0, 0, 0, 1))).flatten(2).mT)
        return self.head(y.mean(1))


PER_TENSOR = Policy(
    name="per tensor",
    rules=(
        Rule(arg="weight", spec=TensorSpec(bits=4, symmetric=True)),
        Rule(op="matmul", spec=TensorSpec(bits=4, granularity=Granularity.HEAD)),
        Rule(spec=TensorSpec(bits=4)),
    ),
)
POLICIES = {
    "twins": policies.ptq4vit(4, 4),
    "uniform": policies.base_ptq(4, 4),
    "8 bits": policies.ptq4vit(8, 8),
    "per tensor": PER_TENSOR,
}


@cache
def _canonical() -> fx.GraphModule:
    return canonical(Vit(), images(2, 16))


@cache
def ready(name: str, metric: Metric) -> FrozenSamples:
    """The frozen graph and all rows of its products."""
    gm = copy.deepcopy(_canonical())
    run_passes(gm, [AssignSpecs(POLICIES[name].rules), InsertObservers()])
    return frozen_with_samples(gm, images(12, 16), replace(EVERY_POINT, metric=metric))


def searched(name: str, search: ScaleSearch) -> fx.GraphModule:
    gm, samples = ready(name, search.metric)
    gm = copy.deepcopy(gm)
    run_passes(gm, [SearchScales(samples, search)])
    return gm


@pytest.mark.parametrize(
    ("name", "metric", "candidates"),
    [
        ("twins", Metric.FISHER, 100),
        ("twins", Metric.HESSIAN, 20),
        ("uniform", Metric.MSE, 20),
        ("8 bits", Metric.L1, 20),
        ("per tensor", Metric.HESSIAN, 20),
    ],
)
def test_a_search_of_every_point_chooses_as_brute_force(
    name: str, metric: Metric, candidates: int
) -> None:
    search = replace(EVERY_POINT, metric=metric, candidates=candidates)
    gm, oracle = searched(name, search), BruteForce(*ready(name, metric), metric)
    oracle.search(search)
    expected, found = oracle.chosen, quantizers(gm)
    assert found.keys() == expected.keys() and len(found) == 18
    for edge, quantizer in found.items():
        assert quantizer.config() == expected[edge].config(), edge
        torch.testing.assert_close(quantizer.scale, expected[edge].scale, rtol=1e-4, atol=0)
        if isinstance(quantizer, UniformQuantizer):
            assert torch.equal(quantizer.zero_point, expected[edge].zero_point), edge


@pytest.mark.parametrize("name", ["twins", "uniform"])
def test_a_search_by_cosine_ends_as_brute_force(name: str) -> None:
    """A weight's scale that changes no code changes no cosine, so that choices may differ.

    Rounding decides among such ties, and alternation may end elsewhere: 4.5 % above brute force on
    one CPU, within 1 % on another.
    """
    search = replace(EVERY_POINT, metric=Metric.COSINE, candidates=20)
    samples = ready(name, Metric.COSINE)[1]
    found = BruteForce(searched(name, search), samples, Metric.COSINE).losses()
    oracle = BruteForce(*ready(name, Metric.COSINE), Metric.COSINE)
    oracle.search(search)
    assert sum(found.values()) < 1.08 * sum(oracle.losses().values())


@pytest.mark.parametrize("metric", [Metric.FISHER, Metric.HESSIAN, Metric.MSE])
@pytest.mark.parametrize("name", POLICIES)
def test_the_default_stride_comes_close(name: str, metric: Metric) -> None:
    samples = ready(name, metric)[1]
    start, best, found = (
        sum(BruteForce(gm, samples, metric).losses().values())
        for gm in (
            ready(name, metric)[0],
            searched(name, replace(EVERY_POINT, metric=metric)),
            searched(name, replace(EVERY_POINT, metric=metric, stride=ScaleSearch().stride)),
        )
    )
    assert best < start and found < 1.03 * best


def test_the_grid_holds_a_twin_of_each_kind() -> None:
    chosen = quantizers(searched("twins", EVERY_POINT)).values()
    sides = {q.two_sided for q in chosen if isinstance(q, TwinUniformQuantizer)}
    assert sides == {False, True}


@pytest.mark.parametrize("name", POLICIES)
def test_no_round_makes_it_worse(name: str) -> None:
    losses = [sum(BruteForce(*ready(name, Metric.FISHER), Metric.FISHER).losses().values())]
    for rounds in (1, 2, 3, 4):
        gm = searched(name, replace(EVERY_POINT, rounds=rounds, stride=8))
        samples = ready(name, Metric.FISHER)[1]
        losses.append(sum(BruteForce(gm, samples, Metric.FISHER).losses().values()))
    for before, after in pairwise(losses):
        assert after <= before * (1 + 1e-5)
    assert losses[-1] < 0.95 * losses[0]


@pytest.mark.slow
def test_default_rows_and_stride_come_close_in_a_trained_block() -> None:
    """512 of 2,048 rows and the default stride against all rows and every point."""
    model = build("glyph_vit")
    part = nn.Sequential(model.patch_embed, model.blocks[0]).eval()
    x, _ = next(iter(DataLoader(GlyphDataset("calib", 32), batch_size=32)))
    whole = with_observers(*policies.ptq4vit(4, 4).rules, model=part, x=x, seed=False)
    every = ScaleSearch(rows=2048, stride=1, rounds=1, memory_bytes=1 << 32)
    usual = replace(every, rows=ScaleSearch().rows, stride=ScaleSearch().stride)
    samples = {s: observe(whole, [(x, None)], s).samples for s in (every, usual)}
    run_passes(whole, [Freeze()])
    losses = []
    for search in (every, usual):
        gm = copy.deepcopy(whole)
        run_passes(gm, [SearchScales(samples[search], search)])
        losses.append(BruteForce(gm, samples[every], Metric.FISHER).losses())
    ratios = torch.tensor([losses[1][name] / losses[0][name] for name in losses[0]])
    # At 8 bits a tenth more: there more of the error lies in the few rows with outliers.
    assert sum(losses[1].values()) < 1.03 * sum(losses[0].values())
    assert float(ratios.median()) < 1.03

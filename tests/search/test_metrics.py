"""Metrics with a gradient order candidate scales as the loss of the whole network does."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from itertools import product

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fxquant import testing
from fxquant.config.scale_search import GRADIENT_METRICS, GradientLoss, Metric
from fxquant.search.metrics import Unit, losses
from fxquant.testing import DIM, seeded
from tests.helpers.sampling import ALL, sampled

KINDS = (GradientLoss.MARGIN, GradientLoss.ARGMAX, GradientLoss.SAMPLED)
METRICS = (*GRADIENT_METRICS, Metric.MSE)
LAYERS = ("embed", "block.attn.proj", "block.fc1", "block.fc2")


class Net(nn.Module):
    """A block and a classifier that reads a few of its channels, with logits of size one."""

    def __init__(self, seed: int, x: Tensor) -> None:
        super().__init__()
        self.embed, self.block, self.head = nn.Linear(DIM, DIM), testing.Block(), nn.Linear(DIM, 6)
        seeded(self, seed)
        with torch.no_grad():
            for layer in (self.block.attn.proj, self.block.fc2, self.head):
                layer.weight *= torch.randn(layer.in_features).mul(1.5).exp()
            self.head.weight /= self(x).std()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(self.embed(x)).mean(1))


def candidates(weight: Tensor) -> Iterator[Tensor]:
    """A weight on 4 bits, per tensor, with scales from a tenth of the range up."""
    for share in torch.linspace(0.1, 1.2, 30):
        step = weight.abs().max() / 7 * share
        yield (weight / step).round().clamp(-8, 7) * step


@torch.no_grad()
def rise(model: nn.Module, weight: Tensor, tried: Tensor, x: Tensor) -> Tensor:
    """Of the cross-entropy against the float model's own softmax."""
    shares = model(x).softmax(1)
    before = weight.detach().clone()
    weight.copy_(tried)
    loss = F.kl_div(model(x).log_softmax(1), shares, reduction="batchmean")
    weight.copy_(before)
    return loss


def rank_correlation(one: Tensor, two: Tensor) -> float:
    """Spearman's."""
    ranks = [values.argsort().argsort().double() for values in (one, two)]
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])


@cache
def correlations() -> dict[tuple[GradientLoss, Metric], float]:
    """Of each metric with the loss, by what the gradient is of; the mean of models and layers."""
    torch.manual_seed(0)
    found: dict[tuple[GradientLoss, Metric], list[float]] = {}
    for seed in range(4):
        x = torch.randn(48, 5, DIM)
        model = Net(seed, x).eval()
        rows = {kind: sampled(model, x, search=replace(ALL, loss=kind)) for kind in KINDS}
        for name in LAYERS:
            weight = model.get_submodule(name).weight
            tries = list(candidates(weight.detach()))
            loss = torch.stack([rise(model, weight, tried, x) for tried in tries])
            for kind, metric in product(KINDS, METRICS):
                sample = rows[kind][name.replace(".", "_")]
                y = torch.stack([sample.lhs @ tried.mT for tried in tries], 2)
                target = sample.lhs @ weight.detach().mT
                ranked = losses(y, target, sample.gradient, metric, Unit.TENSOR)
                found.setdefault((kind, metric), []).append(rank_correlation(ranked, loss))
    return {key: sum(values) / len(values) for key, values in found.items()}


@pytest.mark.parametrize("metric", GRADIENT_METRICS)
@pytest.mark.parametrize("kind", KINDS)
def test_scales_are_ordered_better_than_by_squared_error(
    kind: GradientLoss, metric: Metric
) -> None:
    assert correlations()[kind, metric] > correlations()[kind, Metric.MSE] + 0.1

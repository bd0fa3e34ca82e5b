"""The Hessian metric orders candidate scales as the loss of the whole network does."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fxquant import testing
from fxquant.search.metrics import Unit, losses
from fxquant.spec import GradientLoss, Metric
from fxquant.testing import DIM, seeded
from tests.sampling import ALL, sampled

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


@pytest.mark.parametrize("kind", [GradientLoss.ARGMAX, GradientLoss.SAMPLED])
def test_the_hessian_metric_orders_scales_better_than_squared_error(kind: GradientLoss) -> None:
    found: dict[Metric, list[float]] = {Metric.HESSIAN: [], Metric.MSE: []}
    for seed in range(3):
        x = torch.randn(48, 5, DIM)
        model = Net(seed, x).eval()
        samples = sampled(model, x, search=replace(ALL, loss=kind))
        for name in LAYERS:
            sample, weight = samples[name.replace(".", "_")], model.get_submodule(name).weight
            tries = list(candidates(weight.detach()))
            loss = torch.stack([rise(model, weight, tried, x) for tried in tries])
            y = torch.stack([sample.lhs @ tried.mT for tried in tries], 2)
            target = sample.lhs @ weight.detach().mT
            for metric, values in found.items():
                ranked = losses(y.clone(), target, sample.gradient, metric, Unit.TENSOR)
                values.append(rank_correlation(ranked, loss))
    hessian, mse = (sum(values) / len(values) for values in found.values())
    assert hessian > 0.7 and hessian > mse + 0.1

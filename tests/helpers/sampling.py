"""Samples of a model's products, for tests of what is drawn and what is searched on it."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from fxquant.calibration.observe import observe
from fxquant.calibration.user_loss import Loss
from fxquant.config.scale_search import GradientLoss, Metric, ScaleSearch
from fxquant.policies.policy import Rule
from fxquant.search.product_loss import ProductSample
from tests.helpers.stages import EIGHT, with_observers

# The paper's metric and loss, on all rows.
ALL = ScaleSearch(rows=10_000, metric=Metric.HESSIAN, loss=GradientLoss.ARGMAX)


@cache
def _graph(model: nn.Module, shape: torch.Size) -> fx.GraphModule:
    return with_observers(Rule(spec=EIGHT), model=model, x=torch.zeros(2, *shape), seed=False)


def sampled(
    model: nn.Module,
    *batches: Tensor,
    search: ScaleSearch = ALL,
    loss: Loss | None = None,
    labels: Tensor | None = None,
) -> dict[str, ProductSample]:
    gm = _graph(model, batches[0].shape[1:])
    return observe(gm, [(batch, labels) for batch in batches], search, loss).samples


def argmax_loss(logits: Tensor) -> Tensor:
    return F.cross_entropy(logits, logits.argmax(1), reduction="sum")

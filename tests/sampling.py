"""Samples of a model's products, for tests of what is drawn and what is searched on it."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from fxquant.calibration.observe import observe
from fxquant.calibration.user_loss import Loss
from fxquant.config.scale_search import GradientLoss, Metric, ScaleSearch
from fxquant.graph.capture import capture
from fxquant.passes import AssignSpecs, InsertObservers, run_passes
from fxquant.passes.canonical.canonicalize import CANONICAL
from fxquant.policies.policy import Rule
from fxquant.search.product_loss import ProductSample
from tests.graphs import EIGHT

# The paper's metric and loss, on all rows.
ALL = ScaleSearch(rows=10_000, metric=Metric.HESSIAN, loss=GradientLoss.ARGMAX)


@cache
def _graph(model: nn.Module, shape: torch.Size) -> fx.GraphModule:
    gm = capture(model, torch.zeros(2, *shape))
    run_passes(gm, CANONICAL)
    run_passes(gm, [AssignSpecs((Rule(spec=EIGHT),)), InsertObservers()])
    return gm


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

"""Models brought to a stage of the pipeline: canonical, annotated, observed, frozen.

The model is a seeded ``testing.Block`` where none is named, its input ``testing.tokens()``. A
model that comes with weights of its own is passed with ``seed=False``.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import cache

from torch import Tensor, fx, nn

from fxquant import testing
from fxquant.calibration.observe import observe
from fxquant.config.scale_search import ScaleSearch
from fxquant.config.spec import Granularity, TensorSpec
from fxquant.graph.capture import capture
from fxquant.graph.edges import edges
from fxquant.passes import AssignSpecs, Freeze, InsertObservers, PassResult, run_passes
from fxquant.passes.canonical.canonicalize import CANONICAL
from fxquant.policies.policy import Rule
from fxquant.search.product_loss import ProductSample
from fxquant.testing import seeded, tokens

EIGHT, FOUR = TensorSpec(bits=8), TensorSpec(bits=4)
WEIGHT = TensorSpec(symmetric=True, granularity=Granularity.CHANNEL)

FrozenSamples = tuple[fx.GraphModule, dict[str, ProductSample]]


def canonical(model: nn.Module, x: Tensor, *, seed: bool = True) -> fx.GraphModule:
    """Captured on ``x`` and brought to the dialect."""
    gm = capture(seeded(model) if seed else model, x)
    run_passes(gm, CANONICAL)
    return gm


@cache
def _block() -> fx.GraphModule:
    return canonical(testing.Block(), tokens())


def annotated(
    *rules: Rule, model: nn.Module | None = None, x: Tensor | None = None, seed: bool = True
) -> tuple[fx.GraphModule, PassResult]:
    """A graph with specs on its edges, and what AssignSpecs answered."""
    if model is None:
        gm = copy.deepcopy(_block())
    else:
        gm = canonical(model, tokens() if x is None else x, seed=seed)
    return gm, run_passes(gm, [AssignSpecs(rules)])["AssignSpecs"]


def with_observers(
    *rules: Rule,
    model: nn.Module | None = None,
    x: Tensor | None = None,
    seed: bool = True,
    histograms: bool = False,
) -> fx.GraphModule:
    """A graph of stage OBSERVED whose observers have seen nothing."""
    gm, _ = annotated(*rules, model=model, x=x, seed=seed)
    run_passes(gm, [InsertObservers(histograms=histograms)])
    return gm


def observed(
    *rules: Rule,
    model: nn.Module | None = None,
    data: Sequence[Tensor] | None = None,
    seed: bool = True,
) -> fx.GraphModule:
    """A graph whose observers have seen ``data``, batches the first of which captures it."""
    batches = [tokens()] if data is None else data
    gm = with_observers(*rules, model=model, x=batches[0], seed=seed)
    observe(gm, [(batch, None) for batch in batches])
    return gm


def frozen(
    *rules: Rule,
    model: nn.Module | None = None,
    data: Sequence[Tensor] | None = None,
    seed: bool = True,
) -> fx.GraphModule:
    """A graph with quantizers fitted on ``data``."""
    gm = observed(*rules, model=model, data=data, seed=seed)
    run_passes(gm, [Freeze()])
    return gm


def frozen_with_samples(gm: fx.GraphModule, x: Tensor, search: ScaleSearch) -> FrozenSamples:
    """A graph of stage OBSERVED fitted on ``x`` and frozen, and the rows of its products."""
    samples = observe(gm, [(x, None)], search).samples
    run_passes(gm, [Freeze()])
    return gm, samples


def specs(gm: fx.GraphModule) -> dict[str, TensorSpec | None]:
    return {edge.name: edge.spec for edge in edges(gm)}


def reasons(result: PassResult) -> dict[str, str]:
    return {note.site: note.reason for note in result.notes}

"""Toy models brought to each stage, for tests of the passes that quantize."""

from __future__ import annotations

import copy
from functools import cache

from torch import Tensor, fx, nn

from fxquant import testing
from fxquant.calibration.observe import observe
from fxquant.config.spec import Granularity, TensorSpec
from fxquant.graph.capture import capture
from fxquant.graph.edges import edges
from fxquant.passes import AssignSpecs, InsertObservers, PassResult, run_passes
from fxquant.passes.canonical.canonicalize import CANONICAL
from fxquant.policies.policy import Rule
from fxquant.testing import seeded, tokens

EIGHT, FOUR = TensorSpec(bits=8), TensorSpec(bits=4)
WEIGHT = TensorSpec(symmetric=True, granularity=Granularity.CHANNEL)


def canonical(model: nn.Module, x: Tensor) -> fx.GraphModule:
    gm = capture(seeded(model), x)
    run_passes(gm, CANONICAL)
    return gm


@cache
def _block() -> fx.GraphModule:
    return canonical(testing.Block(), tokens())


def annotated(*rules: Rule, model: nn.Module | None = None) -> tuple[fx.GraphModule, PassResult]:
    gm = copy.deepcopy(_block()) if model is None else canonical(model, tokens())
    return gm, run_passes(gm, [AssignSpecs(rules)])["AssignSpecs"]


def specs(gm: fx.GraphModule) -> dict[str, TensorSpec | None]:
    return {edge.name: edge.spec for edge in edges(gm)}


def reasons(result: PassResult) -> dict[str, str]:
    return {skip.site: skip.reason for skip in result.notes}


def observed(*rules: Rule, model: nn.Module | None = None) -> fx.GraphModule:
    gm, _ = annotated(*rules, model=model)
    run_passes(gm, [InsertObservers()])
    observe(gm, [(tokens(), None)])
    return gm

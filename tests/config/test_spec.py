"""Limits of a scheme: each flag alone decides on the specs and edges that it names."""

from __future__ import annotations

import pytest

from fxquant import Granularity, Rule, Scheme, TensorSpec
from fxquant.config.spec import _LIMITS, SchemeLimits
from fxquant.config.vocabulary import Arg, OpKind
from fxquant.errors import PolicyError
from tests.helpers.refusals import refused
from tests.helpers.stages import EIGHT, annotated

TRIAL = Scheme.TWIN_UNIFORM


def allow(monkeypatch: pytest.MonkeyPatch, limits: SchemeLimits) -> None:
    monkeypatch.setitem(_LIMITS, TRIAL, limits)


def test_a_scheme_may_be_symmetric_and_per_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    allow(monkeypatch, SchemeLimits(allows_symmetric=True))
    assert TensorSpec(scheme=TRIAL, symmetric=True).code_range == (-128, 127)
    text = "is not finer than per tensor: leave out `granularity`"
    with refused(PolicyError, text, got=Granularity.HEAD, expected=Granularity.TENSOR):
        TensorSpec(scheme=TRIAL, symmetric=True, granularity=Granularity.HEAD)


def test_a_scheme_may_be_finer_and_asymmetric(monkeypatch: pytest.MonkeyPatch) -> None:
    allow(monkeypatch, SchemeLimits(allows_finer=True))
    TensorSpec(scheme=TRIAL, granularity=Granularity.HEAD)
    text = "is not symmetric: leave out `symmetric`"
    with refused(PolicyError, text, got=True, expected=False):
        TensorSpec(scheme=TRIAL, symmetric=True, granularity=Granularity.HEAD)


def test_a_scheme_may_be_for_weights_alone_of_the_other_edges(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    allow(monkeypatch, SchemeLimits(allows_weights=True))
    rule = Rule(spec=EIGHT)
    annotated(Rule(arg=Arg.WEIGHT, spec=TensorSpec(scheme=TRIAL)), rule)
    with refused(PolicyError, r"input of layer_norm .* is for inputs of products", got=TRIAL):
        annotated(Rule(op=OpKind.LAYER_NORM, spec=TensorSpec(scheme=TRIAL)), rule)


def test_a_scheme_may_be_for_elementwise_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    allow(monkeypatch, SchemeLimits(allows_elementwise=True))
    rule = Rule(spec=EIGHT)
    annotated(Rule(op=OpKind.LAYER_NORM, spec=TensorSpec(scheme=TRIAL)), rule)
    with refused(PolicyError, edge="attn_qkv__weight", got=TRIAL):
        annotated(Rule(arg=Arg.WEIGHT, spec=TensorSpec(scheme=TRIAL)), rule)

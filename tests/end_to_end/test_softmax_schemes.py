"""Schemes for what softmax gives: where they may stand, how they are fitted and searched."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fxquant
from fxquant import Allocation, Budget, Policy, Rule, TensorSpec, policies
from fxquant.config.scale_search import Metric, ScaleSearch
from fxquant.config.spec import Granularity, ObserverKind, Scheme
from fxquant.errors import BitWidthError, CalibrationError, PolicyError
from fxquant.observers.observer import make_observer
from fxquant.quantizers import FAMILIES, DynamicFocusingQuantizer, Quantizer
from fxquant.search.candidate_rows import SearchedRows
from fxquant.search.metrics import Unit
from fxquant.search.product_loss import Consumer, ProductSample, candidate_losses
from fxquant.search.scales import stacked
from fxquant.testing import Block, seeded, tokens
from tests.helpers.refusals import refused
from tests.helpers.softmax_nets import SCHEMES, compiled, found
from tests.helpers.stages import EIGHT, annotated

SEARCH = ScaleSearch(metric=Metric.MSE, stride=1, candidates=20)


# Specs and rules


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_spec_that_does_not_go_with_the_scheme_is_refused(scheme: Scheme) -> None:
    with refused(
        BitWidthError, f"scheme {scheme} takes 2 to 8 bits, got 9", got=9, expected="2..8"
    ):
        TensorSpec(bits=9, scheme=scheme)
    limits = (False, Granularity.TENSOR)
    text = f"scheme {scheme} is neither symmetric nor finer than per tensor"
    with refused(PolicyError, text, got=(True, Granularity.TENSOR), expected=limits):
        TensorSpec(scheme=scheme, symmetric=True)
    with refused(PolicyError, got=(False, Granularity.HEAD), expected=limits):
        TensorSpec(scheme=scheme, granularity=Granularity.HEAD)
    text = "^max_shift belongs to scheme twin_uniform alone"
    with refused(PolicyError, text, got=scheme, expected=Scheme.TWIN_UNIFORM):
        TensorSpec(scheme=scheme, max_shift=2)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_rule_for_another_edge_is_refused(scheme: Scheme) -> None:
    spec = TensorSpec(bits=4, scheme=scheme)
    text = f"rule 1 gives a weight scheme {scheme}"
    with refused(PolicyError, text, edge="attn_qkv__weight", got=scheme):
        annotated(Rule(arg="weight", spec=spec), Rule(spec=EIGHT))
    with refused(PolicyError, edge="norm1__input", got=scheme):
        annotated(Rule(op="layer_norm", spec=spec), Rule(spec=EIGHT))
    text = r"input of a convolution .* use scheme uniform"
    with refused(PolicyError, text, edge="_1__input", got=scheme):
        net = nn.Sequential(nn.ReLU(), nn.Conv1d(5, 3, 3))
        annotated(Rule(fed_by="relu", spec=spec), Rule(spec=EIGHT), model=net)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_values_below_zero_are_refused_with_the_edge(scheme: Scheme) -> None:
    rule = Rule(fed_by="gelu", spec=TensorSpec(bits=4, scheme=scheme))
    text = "from zero up"
    with refused(CalibrationError, text, edge="fc2__input", expected=">= 0") as caught:
        fxquant.compile(seeded(Block()), [tokens(6)], Policy(name="t", rules=(rule,)))
    assert f"got {caught.value.got:.3g}" in str(caught.value)
    assert -0.2 < caught.value.got < -0.1


def test_the_report_names_the_schemes() -> None:
    for scheme, kind in zip(SCHEMES, ("4 focus", "4 log2", "4 adalog"), strict=True):
        assert kind in str(compiled("block", scheme, 4).report)


# Fits


def softmax_like(seed: int, sharpness: float) -> Tensor:
    """Rows ``(40, 50)`` that a softmax gives."""
    scores = torch.randn(40, 50, generator=torch.Generator().manual_seed(seed))
    return (sharpness * scores).softmax(-1)


def fit(values: Tensor, **spec: object) -> Quantizer:
    observer = make_observer(TensorSpec(**spec), axis=None, where="an_edge")  # type: ignore[arg-type]
    observer(values)
    return observer.fit()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_observers_reach_the_largest_value_or_a_quantile(scheme: Scheme) -> None:
    values = softmax_like(0, 3.0)
    whole = fit(values, bits=4, scheme=scheme)
    assert whole(values.max()) == pytest.approx(float(values.max()))
    cut = fit(values, bits=4, scheme=scheme, observer=ObserverKind.PERCENTILE, percentile=99.8)
    quantile = float(values.flatten().quantile(0.999))
    assert cut(torch.ones(())) == pytest.approx(quantile, abs=1e-3)
    if isinstance(cut, DynamicFocusingQuantizer):
        assert cut.interval[0] == 0


@settings(max_examples=15)  # each tries hundreds of candidates
@given(seed=st.integers(0, 1000), bits=st.integers(2, 8), sharpness=st.sampled_from([0.1, 1, 4]))
@pytest.mark.parametrize("scheme", SCHEMES)
def test_least_squares_is_no_worse_than_the_whole_range(
    scheme: Scheme, seed: int, bits: int, sharpness: float
) -> None:
    values = softmax_like(seed, sharpness)
    fits = [fit(values, bits=bits, scheme=scheme, observer=o) for o in ("mse", "minmax")]
    least, whole = (float((q(values) - values).square().sum()) for q in fits)
    # The fit sees bins, whose width may round a value to the next code.
    assert least <= 1.05 * whole + 1e-6


# Search


def consumer(values: Tensor) -> Consumer:
    generator = torch.Generator().manual_seed(7)
    other = torch.randn(1, 1, values.shape[-1], 6, generator=generator)
    return Consumer(ProductSample(values.view(1, 1, *values.shape), other, None), True, other)


def covering(top: float, spec: TensorSpec) -> Quantizer:
    return FAMILIES[spec.scheme].fit(torch.tensor(0.0), torch.tensor(top), spec, None)


def loss(quantizers: list[Quantizer], reader: Consumer) -> list[float]:
    which = torch.arange(len(quantizers))
    return candidate_losses([reader], which, stacked(quantizers), Metric.MSE, Unit.TENSOR).tolist()


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("sharpness", [0.05, 3.0])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_search_finds_the_best_start_or_base_and_share(
    scheme: Scheme, sharpness: float, bits: int
) -> None:
    values, spec = softmax_like(3, sharpness), TensorSpec(bits=bits, scheme=scheme)
    reader, top = consumer(values), float(values.max())
    shares = torch.logspace(-2, torch.tensor(1.2).log10().item(), 20).tolist()
    candidates = FAMILIES[scheme].candidates
    assert candidates is not None
    rows = candidates(0.0, top, spec, shares)
    fitted = covering(top, spec)
    best = min(loss([fitted, *(q for row in rows for q in row)], reader))
    searched = SearchedRows(fitted, spec, SEARCH, values)
    for turn in range(3):
        searched.improve([reader], SEARCH, turn)
    chosen = searched.quantizer()
    assert loss([chosen], reader)[0] == pytest.approx(best, rel=1e-4)
    assert torch.equal(searched.apply(values, left=True), chosen(values))
    if scheme is Scheme.DYNAMIC_FOCUSING:  # even attention is worth an interval above zero
        assert isinstance(chosen, DynamicFocusingQuantizer)
        assert (chosen.start > 0) == (sharpness < 1)


def test_a_base_of_its_own_and_an_interval_are_worth_their_search() -> None:
    """Sharp attention: powers lose less than uniform steps; even attention: an interval does."""

    def searched(scheme: Scheme, values: Tensor) -> float:
        spec, top = TensorSpec(bits=3, scheme=scheme), float(values.max())
        search = SearchedRows(covering(top, spec), spec, SEARCH, values)
        search.improve([consumer(values)], SEARCH, 0)
        return loss([search.quantizer()], consumer(values))[0]

    sharp, even = softmax_like(3, 2.0), softmax_like(3, 0.05)
    assert searched(Scheme.ADALOG, sharp) < 0.8 * searched(Scheme.LOG2, sharp)
    assert searched(Scheme.ADALOG, sharp) < 0.5 * searched(Scheme.DYNAMIC_FOCUSING, sharp)
    assert searched(Scheme.DYNAMIC_FOCUSING, even) < 0.1 * searched(Scheme.LOG2, even)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_compile_searches_the_scale(scheme: Scheme) -> None:
    rule = Rule(fed_by="softmax", spec=TensorSpec(bits=3, scheme=scheme))
    model = fxquant.compile(seeded(Block()), [tokens(6)], policies.ptq4vit(4, 4).with_rules(rule))
    (name,) = found(model)
    skipped = {note.site for note in model.report.notes}
    assert name.removeprefix("quant.") not in skipped
    assert model.report.changes["SearchScales"] > 10
    again = fxquant.compile(seeded(Block()), [tokens(6)], policies.ptq4vit(4, 4).with_rules(rule))
    assert torch.equal(again(tokens(3)), model(tokens(3)))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_widths_can_be_allocated(scheme: Scheme) -> None:
    rule = Rule(fed_by="softmax", spec=TensorSpec(bits=8, scheme=scheme))
    recipe = policies.mptq_vit(budget=Budget(mean_bits=4)).with_rules(rule)
    assert isinstance(recipe.allocation, Allocation)
    model = fxquant.compile(seeded(Block()), [tokens(6)], recipe)
    (quantizer,) = found(model).values()
    (entry,) = (entry for entry in model.plan if entry.edge == "attn_matmul_1__lhs")
    assert entry.spec is not None and entry.spec.bits == quantizer.bits

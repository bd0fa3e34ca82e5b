"""Search over rows of candidates: one-sided schemes, and a grid with negative values too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fxquant.config.scale_search import Metric, ScaleSearch
from fxquant.config.spec import Granularity, Scheme, TensorSpec
from fxquant.quantizers import FAMILIES, Quantizer, TwinUniformQuantizer, UniformQuantizer
from fxquant.quantizers.candidates import twin_candidates
from fxquant.search.candidate_rows import SearchedRows
from fxquant.search.product_loss import Consumer, ProductSample
from fxquant.search.start import SEARCHES, SearchSite, search_rows, start_search
from fxquant.utils.notes import Refusal

SEARCH = ScaleSearch(metric=Metric.MSE, stride=1, candidates=8)
ONE_SIDED = [s for s in Scheme if s.limits.is_one_sided]


def site(values: Tensor, spec: TensorSpec) -> SearchSite:
    """A left operand ``(rows, columns)`` of a product with a fixed right operand."""
    other = torch.randn(1, 1, values.shape[-1], 6, generator=torch.Generator().manual_seed(7))
    sample = ProductSample(values.view(1, 1, *values.shape), other, None)
    return SearchSite(spec=spec, samples=[sample], left=True, is_weight=False, search=SEARCH)


@pytest.mark.parametrize("scheme", [Scheme.DYNAMIC_FOCUSING, Scheme.LOG2, Scheme.ADALOG])
def test_one_sided_schemes_are_searched_by_rows(scheme: Scheme) -> None:
    assert scheme in ONE_SIDED and SEARCHES[FAMILIES[scheme].quantizer] is search_rows


@pytest.mark.parametrize("scheme", ONE_SIDED)
@given(lo=st.floats(-1.0, 1.0), hi=st.floats(0.0, 1e3), data=st.data())
def test_candidates_of_one_sided_schemes_depend_on_the_largest_value_alone(
    scheme: Scheme, lo: float, hi: float, data: st.DataObject
) -> None:
    bits = data.draw(st.integers(2, min(8, scheme.limits.max_bits)))
    spec, candidates = TensorSpec(bits=bits, scheme=scheme), FAMILIES[scheme].candidates
    assert candidates is not None
    forms = [
        [
            (q.config(), {name: tensor.tolist() for name, tensor in q.named_buffers()})
            for row in candidates(least, hi, spec, (0.1, 1.0))
            for q in row
        ]
        for least in (0.0, lo)
    ]
    assert forms[0] == forms[1]


def test_quantizers_with_an_axis_are_not_searched_by_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    searches: dict[type[Quantizer], Any] = {UniformQuantizer: search_rows}
    monkeypatch.setattr("fxquant.search.start.SEARCHES", searches)
    spec, ends = TensorSpec(granularity=Granularity.CHANNEL), torch.ones(3)
    refusal = start_search(FAMILIES[spec.scheme].fit(-ends, ends, spec, -1), site(ends[None], spec))
    assert isinstance(refusal, Refusal)
    assert refusal.reason == (
        "its scale was not searched: scheme uniform is searched per tensor alone"
    )


def test_a_two_sided_grid_is_searched_over_its_negative_values_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A trial row: twin quantizers, whose candidates depend on both ends, searched by rows."""
    spec, ends = TensorSpec(bits=4, scheme=Scheme.TWIN_UNIFORM), []

    def candidates(
        lo: float, hi: float, spec: TensorSpec, shares: Sequence[float]
    ) -> list[list[TwinUniformQuantizer]]:
        ends.append((lo, hi))
        return [twin_candidates(lo, hi, spec, shares)]

    family = replace(FAMILIES[spec.scheme], candidates=candidates)
    monkeypatch.setitem(FAMILIES, spec.scheme, family)
    searches: dict[type[Quantizer], Any] = {TwinUniformQuantizer: search_rows}
    monkeypatch.setattr("fxquant.search.start.SEARCHES", searches)
    generator = torch.Generator().manual_seed(3)
    values = torch.nn.functional.silu(2 * torch.randn(32, 16, generator=generator))
    fitted = family.fit(torch.tensor(-4.0), torch.tensor(40.0), spec, None)
    where = site(values, spec)
    search = start_search(fitted, where)
    assert isinstance(search, SearchedRows)
    assert ends == [(float(values.min()), float(values.max()))]
    (sample,) = where.samples
    search.improve([Consumer(sample, True, sample.rhs)], SEARCH, 0)
    chosen = search.quantizer()
    assert isinstance(chosen, TwinUniformQuantizer) and chosen.two_sided
    assert (chosen(values) < 0).any()
    exact = sample.lhs @ sample.rhs
    errors = [float((q(sample.lhs) @ sample.rhs - exact).square().mean()) for q in (chosen, fitted)]
    assert errors[0] < 0.25 * errors[1]

"""OPT-m: the region ratio of a twin quantizer searched with its scale."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fxquant
from fxquant import TensorSpec, policies
from fxquant.config.scale_search import Metric, ScaleSearch
from fxquant.config.spec import Scheme
from fxquant.quantizers import TwinUniformQuantizer, UniformQuantizer
from fxquant.search.metrics import Unit
from fxquant.search.product_loss import Consumer, ProductSample, candidate_losses
from fxquant.search.region_ratio import SearchedRegionRatio
from fxquant.search.scales import SearchedTwin, stacked
from fxquant.testing import Block, seeded, tokens

SEARCH = ScaleSearch(metric=Metric.MSE, search_region_ratio=True, candidates=12, stride=1, rounds=2)


def operand(values: Tensor) -> Consumer:
    torch.manual_seed(1)
    sample = ProductSample(values, torch.randn(1, 1, values.shape[-1], 5), None, channels=True)
    return Consumer(sample, True, sample.rhs)


def drawn(seed: int, *, two_sided: bool) -> Tensor:
    torch.manual_seed(seed)
    values = 3 * torch.randn(1, 1, 24, 8)
    return torch.nn.functional.gelu(values) if two_sided else values.softmax(-1)


def fitted(values: Tensor, spec: TensorSpec) -> TwinUniformQuantizer:
    return TwinUniformQuantizer.from_range(*values.aminmax(), spec)


def loss(consumer: Consumer, quantizer: object) -> float:
    index = torch.zeros(1, dtype=torch.long)
    quantize = stacked([quantizer])  # type: ignore[list-item]
    return float(candidate_losses([consumer], index, quantize, Metric.MSE, Unit.TENSOR))


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 999), bits=st.integers(2, 8), two_sided=st.booleans())
def test_never_worse_than_the_rule_or_a_uniform_grid(seed: int, bits: int, two_sided: bool) -> None:
    values, spec = drawn(seed, two_sided=two_sided), TensorSpec(bits=bits, scheme="twin_uniform")
    start, consumer = fitted(values, spec), operand(values)
    ours, rule = (kind(start, spec, SEARCH, values) for kind in (SearchedRegionRatio, SearchedTwin))
    for turn in range(2):
        ours.improve([consumer], SEARCH, turn)
        rule.improve([consumer], SEARCH, turn)
    lo, hi = values.aminmax()
    plain = UniformQuantizer.from_range(lo, hi, TensorSpec(bits=bits), None)
    found = loss(consumer, ours.quantizer())
    assert found <= loss(consumer, rule.quantizer()) * (1 + 1e-5)
    assert found <= loss(consumer, plain) * (1 + 1e-5)
    _, error_ratio = ours.comparison
    assert error_ratio == pytest.approx(found / loss(consumer, rule.quantizer()), rel=1e-4)
    assert error_ratio <= 1
    torch.testing.assert_close(ours.apply(values, left=True), ours.quantizer()(values))


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("two_sided", [True, False])
def test_every_ratio_with_every_step_is_tried(bits: int, two_sided: bool) -> None:
    """With a stride of one the choice is that of brute force over the whole grid."""
    values, spec = drawn(7, two_sided=two_sided), TensorSpec(bits=bits, scheme="twin_uniform")
    consumer, levels = operand(values), 1 << (bits - 1)
    full = max(float(values.max()) / (levels - 1), -float(values.min()) / levels)
    losses = [
        loss(
            consumer,
            TwinUniformQuantizer(
                torch.tensor(full * share / 2**shift), shift=shift, bits=bits, two_sided=two_sided
            ),
        )
        for shift in range(0 if two_sided else 1, 12)
        for share in torch.linspace(SEARCH.low, SEARCH.high, SEARCH.candidates).tolist()
    ]
    searched = SearchedRegionRatio(fitted(values, spec), spec, SEARCH, values)
    searched.improve([consumer], SEARCH, 0)
    assert loss(consumer, searched.quantizer()) <= min(losses) * (1 + 1e-5)


def test_what_is_chosen_is_annotated_reported_and_exported(tmp_path: Path) -> None:
    model, batch = seeded(Block()), tokens(8)
    policy = policies.ptq4vit(
        4, 4, search=ScaleSearch(rows=64, search_region_ratio=True, candidates=20)
    )
    compiled = fxquant.compile(model, [batch], policy)
    gains = {item.site: (item.choice, item.error_ratio) for item in compiled.report.comparisons}
    twins = {e.edge: e for e in compiled.plan if e.fed_by in ("softmax", "gelu")}
    assert gains.keys() == twins.keys()
    for name, (choice, ratio) in gains.items():
        spec, module = twins[name].spec, compiled.graph_module.get_submodule(twins[name].quantizer)
        assert spec is not None
        assert ratio <= 1
        assert (choice == "uniform") == (spec.scheme is Scheme.UNIFORM)
        assert isinstance(module, UniformQuantizer) == (spec.scheme is Scheme.UNIFORM)
        assert choice in str(compiled.report)
    path = f"{tmp_path}/model.onnx"
    compiled.export_onnx(path)  # checks onnxruntime against the simulation
    compiled.save(f"{tmp_path}/saved")
    again = fxquant.load(f"{tmp_path}/saved")
    assert again.report.comparisons == compiled.report.comparisons
    torch.testing.assert_close(again(batch), compiled(batch))

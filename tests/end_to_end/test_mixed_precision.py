"""A policy with an allocation, from ``compile()`` to the report."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxquant
from fxquant import Policy, Rule, TensorSpec, policies
from fxquant.compiled.report import Report
from fxquant.config.allocation import Allocation, Budget, Cost, Method
from fxquant.config.scale_search import Metric, ScaleSearch
from fxquant.config.spec import ObserverKind
from fxquant.config.vocabulary import Arg
from fxquant.demo.glyphs import GlyphDataset
from fxquant.demo.models import build
from fxquant.errors import CalibrationError, PolicyError
from fxquant.graph.edges import edges
from fxquant.graph.nodes import get_parameter, operand
from fxquant.mixed_precision.allocate.plan import allocate, sweep
from fxquant.mixed_precision.allocate.result import AllocationResult
from fxquant.mixed_precision.choose import reservoir_for
from fxquant.mixed_precision.sensitivity.loss_cache import LossCache
from fxquant.quantizers import Quantizer
from fxquant.testing import images
from tests.helpers.refusals import refused
from tests.helpers.stages import observed

FOUR = Budget(mean_bits=4)


def mixed(budget: Budget = FOUR, search: ScaleSearch | None = None, **options: Any) -> Policy:
    return dataclasses.replace(
        policies.ptq4vit(), search=search, allocation=Allocation(budget=budget, **options)
    )


def compiled(
    model: nn.Module, policy: Policy, cache: Path | None = None
) -> tuple[fxquant.CompiledModel, AllocationResult]:
    torch.manual_seed(0)
    result = fxquant.compile(model, [images(8, 16)], policy, cache=cache)
    assert result.report.allocation is not None
    return result, result.report.allocation


def test_ranges_that_cut_values_off_are_no_obstacle(vit: nn.Module) -> None:
    # Widths are judged with ranges of least squared error where a search is to find the scales.
    clipped = Rule(arg=Arg.LHS, spec=TensorSpec(observer=ObserverKind.PERCENTILE, percentile=99.0))
    _, outcome = compiled(vit, mixed(search=ScaleSearch(rounds=1)).with_rules(clipped))
    assert outcome.costs["mean_bits"] <= 4


@pytest.mark.parametrize("method", Method)
def test_a_budget_of_a_mean_width_is_kept(vit: nn.Module, method: Method) -> None:
    model, outcome = compiled(vit, mixed(method=method))
    assert 3.5 < outcome.costs["mean_bits"] <= 4 and len(set(outcome.bits)) > 1
    assert outcome.images == 8 and outcome.method == method
    widths = dict(zip((g.name for g in outcome.problem.groups), outcome.bits, strict=True))
    for group in outcome.problem.groups:
        for edge in group.edges:
            (entry,) = [e for e in model.report.plan if e.edge == edge]
            assert entry.spec is not None and entry.spec.bits == widths[group.name]
            quantizer = model.graph_module.get_submodule(str(entry.quantizer))
            assert isinstance(quantizer, Quantizer) and quantizer.bits == widths[group.name]
    assert "patch_embed_proj__input" not in widths  # pinned by the preset


def test_costs_are_those_of_the_plan(vit: nn.Module) -> None:
    model, outcome = compiled(vit, mixed(Budget(weight_bytes=4000)))
    bits = {entry.edge: entry.spec.bits for entry in model.report.plan if entry.spec is not None}
    total = sum(
        get_parameter(model.graph_module, operand(edge.source, 0)).numel() * bits[edge.name]
        for edge in edges(model.graph_module)
        if edge.arg is Arg.WEIGHT
    )
    assert outcome.costs["weight_bytes"] == total / 8 <= 4000
    assert outcome.costs["mean_act_bits"] == pytest.approx(8, abs=0.3)  # none had to be lowered


def test_exact_is_predicted_no_worse_than_greedy_and_both_better_than_uniform(
    vit: nn.Module,
) -> None:
    _, outcome = compiled(vit, mixed(Budget(mean_bits=6), images=4))
    problem = outcome.problem
    uniform = problem.costs([4] * len(problem.groups))
    budget = Budget(mean_bits=uniform[Cost.MEAN_BITS])
    exact, greedy = (allocate(problem, budget, method).loss for method in Method)
    assert exact <= greedy < problem.loss([4] * len(problem.groups))
    assert {point.method for point in sweep(problem, Cost.BITOPS, 3)} == {
        "uniform",
        "exact",
        "greedy",
    }


def test_the_report_says_what_was_asked_reached_and_measured(
    vit: nn.Module, tmp_path: Path
) -> None:
    model, outcome = compiled(vit, mixed(Budget(mean_bits=4, weight_bytes=10**6)))
    text = str(model.report)
    assert "widths by exact, measured sensitivities on 8 images: weight_bytes" in text
    assert "of at most 4" in text and "rank correlation of measured and estimated" in text
    assert outcome.rank_correlation is not None and outcome.rank_correlation > 0.8
    assert outcome.measured_loss is not None and math.isfinite(outcome.measured_loss)
    for group, bits in zip(outcome.problem.groups, outcome.bits, strict=True):
        assert any(group.name[:12] in line and f" {bits} " in line for line in text.splitlines())
    assert Report.from_dict(json.loads(json.dumps(model.report.to_dict()))) == model.report
    model.save(tmp_path)
    loaded = fxquant.load(tmp_path)
    assert loaded.report.allocation == outcome
    assert torch.equal(loaded(images(2, 16)), model(images(2, 16)))


@pytest.mark.parametrize("method", Method)
def test_estimated_sensitivities_run_no_network(
    vit: nn.Module, tmp_path: Path, method: Method
) -> None:
    _, outcome = compiled(vit, mixed(sensitivity="estimated", method=method), tmp_path)
    assert outcome.costs["mean_bits"] <= 4 and outcome.images == 0
    assert outcome.measured_loss is None and outcome.rank_correlation is None
    assert list(tmp_path.iterdir()) == []


def test_a_search_of_scales_follows_at_the_chosen_widths(vit: nn.Module) -> None:
    search = ScaleSearch(metric=Metric.COSINE, rounds=1, rows=64)
    model, outcome = compiled(vit, mixed(search=search))
    assert outcome.costs["mean_bits"] <= 4 and model.report.changes["SearchScales"] > 0


def test_a_lower_mean_never_predicts_a_smaller_loss(vit: nn.Module, tmp_path: Path) -> None:
    losses = [
        compiled(vit, mixed(Budget(mean_bits=bits)), tmp_path)[1].loss for bits in (3.5, 4, 5, 7)
    ]
    assert losses == sorted(losses, reverse=True) and losses[0] > 2 * losses[-1]
    assert len(list(tmp_path.iterdir())) == 1  # one set of sensitivities for all


# Interrupted


class Stopped(Exception):
    """What ends a run in the middle."""


def interrupted(
    monkeypatch: pytest.MonkeyPatch, model: nn.Module, policy: Policy, cache: Path, after: int
) -> None:
    put, count = LossCache.put, 0

    def stops(self: LossCache, key: Any, loss: float) -> None:
        nonlocal count
        if count == after:
            raise Stopped
        count += 1
        put(self, key, loss)

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(LossCache, "put", stops)
        compiled(model, policy, cache)


@pytest.mark.parametrize("method", Method)
def test_an_interrupted_search_goes_on_bit_for_bit(
    vit: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: Method
) -> None:
    policy = mixed(method=method)
    model, outcome = compiled(vit, policy)
    for after in (0, 7, 31):
        interrupted(monkeypatch, vit, policy, tmp_path, after)
    (path,) = tmp_path.iterdir()
    assert len(path.read_text().splitlines()) == 1 + 7 + 31
    with path.open("a") as file:
        file.write('{"what": "torn')
    again, resumed = compiled(vit, policy, tmp_path)
    assert resumed == outcome
    assert torch.equal(again(images(3, 16)), model(images(3, 16)))


def test_nothing_is_measured_twice(
    vit: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, outcome = compiled(vit, mixed(), tmp_path)
    (path,) = tmp_path.iterdir()
    before = path.read_text()

    def refuse(*_: object) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr("fxquant.mixed_precision.choose.MeasuredSensitivity", refuse)
    assert compiled(vit, mixed(), tmp_path)[1] == outcome and path.read_text() == before


def test_other_images_are_not_mixed_in(vit: nn.Module, tmp_path: Path) -> None:
    compiled(vit, mixed(images=4), tmp_path)
    compiled(vit, mixed(images=4, seed=1), tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


# What cannot be done


@pytest.mark.parametrize(
    ("budget", "limit", "text"),
    [
        (Budget(mean_bits=2), 2, "is at least 3.*Raise the budget, or allow narrower widths"),
        (Budget(weight_bytes=100), 100, None),
        (Budget(bitops=1000, mean_bits=8), 1000, None),
    ],
)
def test_a_budget_that_cannot_be_met_says_the_least_before_measuring(
    vit: nn.Module, tmp_path: Path, budget: Budget, limit: float, text: str | None
) -> None:
    with refused(PolicyError, text, got=limit):
        compiled(vit, mixed(budget), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_it_says_so_before_channels_are_smoothed(
    vit: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fxquant.compiler.choose_smoothing", pytest.fail)
    policy = policies.mptq_vit(4, 4, budget=Budget(mean_act_bits=2))
    with refused(PolicyError, "^the budget cannot be met: mean_act_bits is at least", got=2):
        compiled(vit, policy)


def test_a_policy_whose_edges_are_all_pinned_has_no_width_to_choose(vit: nn.Module) -> None:
    policy = Policy(
        name="p",
        rules=(Rule(spec=TensorSpec(), pinned=True),),
        allocation=Allocation(budget=FOUR),
    )
    with pytest.raises(PolicyError, match="every quantized edge is pinned"):
        compiled(vit, policy)


def test_what_cannot_be_estimated_asks_for_measured_sensitivities() -> None:
    class Dynamic(nn.Module):
        """A product of matrices whose size is the batch."""

        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.head((x @ x.t()).softmax(-1) @ x)
            return logits

    policy = mixed(Budget(mean_bits=6), sensitivity="estimated")
    x = torch.randn(6, 4)
    text = "choose measured sensitivities, or pin its width"
    with refused(CalibrationError, text, edge="matmul_1__lhs"):
        fxquant.compile(Dynamic().eval(), [x], policy)


def test_images_are_as_many_as_the_work_allows() -> None:
    gm = observed(Rule(spec=TensorSpec()))

    def count(**options: Any) -> int:
        picked = reservoir_for(gm, Allocation(budget=FOUR, **options))
        list(picked.observe([(torch.zeros(100, 1), None)]))
        return len(picked.images)

    assert count() == 32 and count(max_macs=1.0) == 4 and count(images=50, max_macs=1.0) == 50
    some = [count(max_macs=float(macs)) for macs in range(200_000, 2_000_000, 100_000)]
    assert some == sorted(some) and len(set(some)) > 3


# The shipped models


@pytest.mark.slow
def test_mixed_widths_beat_one_width_on_a_shipped_model(tmp_path: Path) -> None:
    """By the loss against the float model on images that no choice was made on."""
    data = GlyphDataset("calib", 32)
    calibration = [torch.stack([data[i][0] for i in range(32)])]
    test = GlyphDataset("test", 100)
    held_out = torch.stack([test[i][0] for i in range(100)])
    model = build("glyph_vit")
    with torch.no_grad():
        target = model(held_out).log_softmax(1)

    def distance(policy: Policy) -> float:
        result = fxquant.compile(model, calibration, policy, cache=tmp_path)
        with torch.no_grad():
            found = result(held_out).log_softmax(1)
        return float((target.exp() * (target - found)).sum(1).mean())

    base = dataclasses.replace(policies.w8a8(), allocation=Allocation(budget=FOUR, images=4))
    uniform = dataclasses.replace(base, allocation=Allocation(budget=FOUR, images=4, widths=(4,)))
    assert distance(base) < distance(uniform)

"""The report: the plan, what stayed float and why, and the noise of edges and outputs."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import fxquant
from fxquant import Rule, TensorSpec, testing
from fxquant.compiled.report import sqnr_of
from fxquant.config.vocabulary import Arg
from fxquant.quantizers import Quantizer
from fxquant.testing import DIM, images, seeded, tokens
from fxquant.utils.notes import Comparison, Note, NoteKind

X = images(4, 16)


def test_plan_and_report(quantized: fxquant.CompiledModel) -> None:
    report = quantized.report
    plan = {entry.edge: entry for entry in quantized.plan}
    softmax = plan["blocks_0_attn_matmul_1__lhs"]
    assert (softmax.fed_by, softmax.op, softmax.arg) == ("softmax", "matmul", "lhs")
    assert softmax.path == "blocks.0.attn"
    assert softmax.spec == TensorSpec(bits=8)
    assert plan["patch_embed_proj__input"].fed_by == "image"
    assert report.left_float == () and report.policy == "w8a8"
    assert report.quantized_bytes < 0.5 * report.float_bytes
    assert set(report.seconds) == {"capture", "calibrate", "fit", "report"}

    modules = {n for n, m in quantized.graph_module.named_modules() if isinstance(m, Quantizer)}
    assert {entry.quantizer for entry in quantized.plan} == modules == set(report.sqnr)
    assert all(25 < decibel < 90 for decibel in report.sqnr.values())

    text = str(report)
    for part in (*plan, "softmax", "8 sym", "8 asym", "SQNR", "w8a8: 20 of 20 edges"):
        assert part in text
    assert type(report).from_dict(report.to_dict()) == report


def test_the_outputs_noise_is_that_of_the_first_images(
    vit: nn.Module, quantized: fxquant.CompiledModel
) -> None:
    with torch.no_grad():
        signal, found = vit(X[:8]).double(), quantized(X[:8]).double()
    decibels = 10 * float((signal.square().sum() / (found - signal).square().sum()).log10())
    assert quantized.report.output_sqnr == pytest.approx(decibels, rel=1e-6)
    assert f"outputs at {decibels:.1f} dB" in quantized.report.summary()


class InPlace(nn.Module):
    """Changes the images it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(DIM, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.head(x.sub_(0.5).mul_(2))
        return y


def test_the_outputs_noise_is_of_the_captured_network_and_leaves_the_images_alone() -> None:
    model = seeded(InPlace())
    x = tokens(8)
    before = x.clone()
    compiled = fxquant.compile(model, [x])
    assert torch.equal(x, before)
    with torch.no_grad():
        signal, found = model(before.clone()), compiled(before.clone())
    noise = (found - signal).square().sum()
    decibels = 10 * float((signal.square().sum() / noise).log10())
    assert compiled.report.output_sqnr == pytest.approx(decibels, abs=0.01)

    plain = seeded(testing.Block())
    hooked = seeded(testing.Block())
    hooked.register_forward_hook(lambda module, args, output: (output * 3, output))
    reports = [fxquant.compile(one, [tokens()]).report for one in (plain, hooked)]
    assert reports[0].output_sqnr == pytest.approx(reports[1].output_sqnr)


def test_outputs_beyond_float32_are_all_noise() -> None:
    signal = [torch.tensor([1.0, -torch.inf])]

    def noise_of(outputs: list[float]) -> float:
        return sqnr_of(signal, [torch.tensor(outputs)])

    assert noise_of([torch.inf, -torch.inf]) == -math.inf
    assert noise_of([1.0, -torch.inf]) == math.inf
    assert noise_of([1.1, -torch.inf]) == pytest.approx(20, abs=0.01)


def test_what_stays_float_is_listed_with_its_reason(vit: nn.Module) -> None:
    policy = fxquant.policies.w8a8().with_rules(Rule(path="head", spec=None))
    model = fxquant.compile(vit, [X], policy)
    assert {e.edge: e.reason for e in model.report.left_float} == {
        "head__input": "left float: rule 1 keeps it float",
        "head__weight": "left float: rule 1 keeps it float",
    }
    assert "head__input: left float: rule 1 keeps it float" in str(model.report)
    assert "18 of 20 edges" in model.report.summary()


def test_more_bits_are_reported_as_less_noise() -> None:
    model = seeded(testing.Block())
    reports = [
        fxquant.compile(model, [tokens()], fxquant.policies.minmax(bits, bits)).report
        for bits in (4, 8)
    ]
    coarse, fine = (report.sqnr for report in reports)
    assert 12 < reports[1].output_sqnr - reports[0].output_sqnr < 36
    gains = [fine[name] - coarse[name] for name in fine]
    assert 18 < sum(gains) / len(gains) < 30  # about 6 dB a bit


def test_parameters_that_layers_share_are_counted_once() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.head = nn.Linear(DIM, DIM), nn.Linear(DIM, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.layer(self.layer(x).relu()))

    report = fxquant.compile(seeded(Shared()), [tokens()], "w8a8").report
    assert report.float_bytes == 4 * (DIM * DIM + DIM + 3 * DIM + 3)
    scales = report.quantized_bytes - (DIM * DIM + 3 * DIM + 4 * (DIM + 3))
    assert 4 * (DIM + 3) < scales <= 4 * (2 * DIM + 3 + 3)


@pytest.mark.parametrize("spec", [None, TensorSpec(bits=4)])
def test_a_weight_that_is_read_in_two_ways_is_stored_whole(spec: TensorSpec | None) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = (nn.Linear(DIM, DIM, bias=False) for _ in range(2))
            self.two.weight = self.one.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.two(self.one(x).relu())

    policy = fxquant.policies.w8a8().with_rules(Rule(path="two", arg=Arg.WEIGHT, spec=spec))
    report = fxquant.compile(seeded(Tied()), [tokens()], policy).report
    assert report.float_bytes == 4 * DIM * DIM < report.quantized_bytes


def test_a_layer_of_zeros_costs_nothing() -> None:
    model = seeded(nn.Sequential(nn.Linear(DIM, DIM), nn.ReLU(), nn.Linear(DIM, DIM)))
    nn.init.zeros_(model[2].weight)
    compiled = fxquant.compile(model, [tokens()])
    assert compiled.report.sqnr["quant._2__weight"] == math.inf
    assert type(compiled.report).from_dict(compiled.report.to_dict()) == compiled.report


def test_the_old_form_of_comparisons_still_works(quantized: fxquant.CompiledModel) -> None:
    item = Comparison("fc1", "bias", "output error", 0.5, step="Compensate")
    report = replace(quantized.report, comparisons=(item,))
    with pytest.warns(DeprecationWarning, match=r"Report\.gains is now Report\.comparisons"):
        gains = report.gains
    assert gains == (("Compensate", "fc1", "bias", "output error", 0.5),)
    assert "Compensate: fc1: bias: output error x 0.50" in str(report)


def test_notes_unpack_as_the_tuples_that_they_were(quantized: fxquant.CompiledModel) -> None:
    note = Note(NoteKind.SKIPPED, "fc1", "it is a toy", step="Compensate")
    report = replace(quantized.report, notes=(note,))
    with pytest.warns(DeprecationWarning, match=r"read note\.step, note\.site and note\.reason"):
        ((step, site, reason),) = report.notes
    assert (step, site, reason) == ("Compensate", "fc1", "it is a toy")

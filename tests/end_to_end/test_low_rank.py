"""compile() with low-rank branches: every backend, saving, the report, the shipped models."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

import onnx
import pytest
import torch
from torch import nn

import fxquant
from fxquant import CompiledModel, LowRank, Policy, policies
from fxquant.backends.onnx_qdq import doctor
from fxquant.demo.glyphs import GlyphDataset
from fxquant.demo.models import build
from fxquant.policies.policy import Rule
from fxquant.policies.policy_file import policy_from_dict, policy_to_dict, read_policy, write_policy
from fxquant.testing import DIM, Block, seeded, tokens
from tests.helpers.agreement import assert_same_codes
from tests.helpers.integer_helpers import assert_integer_equals_simulation
from tests.helpers.stages import WEIGHT

COARSE = replace(WEIGHT, bits=3)


def branched(weight_bits: int, act_bits: int, **options: object) -> Policy:
    low_rank = LowRank(**(options or {"rank": 2}))
    return replace(policies.ptq4vit(weight_bits, act_bits), low_rank=low_rank)


@cache
def compiled(weight_bits: int, act_bits: int) -> CompiledModel:
    """A block; not to be changed."""
    return fxquant.compile(seeded(Block()), [tokens(24)], branched(weight_bits, act_bits))


@pytest.mark.parametrize("bits", [(3, 4), (3, 8)])
def test_every_backend_computes_the_branches(bits: tuple[int, int], tmp_path: Path) -> None:
    """With twin codes in one product (4 bits) and in two (8 bits)."""
    model, x = compiled(*bits), tokens(5)
    count = model.report.changes["AttachLowRank"]
    assert count >= 5
    assert_integer_equals_simulation(model.graph_module, model.lower("integer"), x)
    exported = model.export_onnx(tmp_path / "m.onnx")
    assert exported.unfused == ()
    assert sum(exported.fused.values()) >= 8 + 2 * count
    assert_same_codes(model, exported.path, x)


def test_a_value_that_a_product_and_its_branch_read_is_quantized_once(tmp_path: Path) -> None:
    policy = replace(policies.minmax(3, 8), low_rank=LowRank(rank=2))
    model = fxquant.compile(seeded(nn.Linear(DIM, 6)), [tokens(24)], policy)
    path = model.export_onnx(tmp_path / "m.onnx").path
    written = [node.op_type for node in onnx.load(str(path)).graph.node]
    assert written.count("QuantizeLinear") == 2  # of the input, and between the factors
    report = doctor(path)
    assert report.ok and report.unfused == () and sum(report.fused.values()) == 3


def test_saving_and_loading_keeps_branches(tmp_path: Path) -> None:
    model, x = compiled(3, 4), tokens(5)
    model.save(tmp_path)
    again = fxquant.load(tmp_path)
    assert torch.equal(again(x), model(x)) and again.plan == model.plan
    assert torch.equal(again.lower("integer")(x), model.lower("integer")(x))
    assert again.report.comparisons == model.report.comparisons
    assert again.policy["low_rank"] == {"rank": 2, "bits": 8}


def test_the_report_says_what_a_branch_costs_and_gains() -> None:
    text = str(compiled(3, 8).report)
    assert "fc1: branch of rank 2, +37.5% multiplications, +124 bytes: output error" in text


def test_what_is_fully_quantized_says_that_the_sum_is_float() -> None:
    base = policies.w8a8(full=True).with_rules(Rule(arg="weight", spec=COARSE))
    model = fxquant.compile(seeded(Block()), [tokens(24)], replace(base, low_rank=LowRank(rank=2)))
    lowered = model.lower("integer")
    assert "sum" in lowered.meta["float_because"]
    assert_integer_equals_simulation(model.graph_module, lowered, tokens(5))


@pytest.mark.parametrize("low_rank", [LowRank(rank=4), LowRank(share=0.25, bits=6)])
def test_a_policy_with_branches_survives_yaml(low_rank: LowRank, tmp_path: Path) -> None:
    policy = replace(policies.ptq4vit(4, 4), low_rank=low_rank)
    write_policy(policy, tmp_path / "p.yaml")
    assert read_policy(tmp_path / "p.yaml") == policy
    assert policy_from_dict(policy_to_dict(policy)) == policy


@pytest.mark.slow
def test_a_shipped_model_comes_closer_to_the_float_one(tmp_path: Path) -> None:
    calibration = torch.stack([GlyphDataset("calib", 32)[i][0] for i in range(32)])
    held_out = torch.stack([GlyphDataset("test", 50)[i][0] for i in range(50)])
    base = policies.w8a8().with_rules(Rule(arg="weight", spec=COARSE))
    with torch.no_grad():
        exact = build("glyph_vit")(held_out).log_softmax(1)
    divergences = {}
    for low_rank in (None, LowRank(rank=16)):
        policy = replace(base, low_rank=low_rank)
        model = fxquant.compile(build("glyph_vit"), calibration.split(16), policy)
        with torch.no_grad():
            own = model(held_out).log_softmax(1)
        divergences[low_rank] = float((exact.exp() * (exact - own)).sum(1).mean())
    assert divergences[LowRank(rank=16)] < 0.6 * divergences[None]
    exported = model.export_onnx(tmp_path / "m.onnx")
    assert exported.unfused == ()
    assert_same_codes(model, exported.path, held_out[:8])
    assert_integer_equals_simulation(model.graph_module, model.lower("integer"), held_out[:4])

"""Mixed precision on the command line: a budget for ``compile``, and ``pareto``."""

from __future__ import annotations

import csv
from argparse import Namespace
from pathlib import Path

import pytest
from PIL import Image
from torch import nn

import fxquant
from fxquant import policies
from fxquant.cli import main
from fxquant.cli.widths import with_budget
from fxquant.config.allocation import Allocation, Budget, Method
from fxquant.errors import PolicyError
from fxquant.testing import images
from tests.helpers.cli_helpers import ARGS, VIT, fails


@pytest.mark.slow
def test_a_budget_is_met_kept_and_swept(
    flat: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    arguments = ["compile", VIT, *ARGS, "--random-weights", "--data", str(flat), "--out", str(out)]
    budget = ["--policy", "w8a8", "--mean-bits", "4.5", "--allocate", "greedy"]
    assert main([*arguments, *budget]) == 0
    printed = capsys.readouterr().out
    assert "w8a8_mixed: " in printed
    assert "widths by greedy, measured sensitivities" in printed
    assert len(list((out / "cache").glob("sensitivity-*.jsonl"))) == 1
    outcome = fxquant.load(out).report.allocation
    assert outcome is not None and outcome.costs["mean_bits"] <= 4.5
    assert main(["pareto", str(out), "--cost", "weight_bytes", "--steps", "4"]) == 0
    assert "uniform" in capsys.readouterr().out
    rows = list(csv.DictReader((out / "pareto.csv").read_text().splitlines()))
    assert {row["method"] for row in rows} == {"uniform", "greedy", "exact"}
    with Image.open(out / "pareto.png") as plot:
        assert plot.width > 300


def test_a_model_without_a_budget_has_nothing_to_sweep(
    vit: nn.Module, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fxquant.compile(vit, [images(2, 16)]).save(tmp_path)
    assert "was compiled without a budget" in fails(capsys, "pareto", tmp_path)


def test_a_budget_that_cannot_be_met_ends_with_the_least(
    flat: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start = ["compile", VIT, *ARGS, "--random-weights", "--data", flat, "--out", tmp_path]
    assert "weight_bytes is at least" in fails(capsys, *start, "--weight-bytes", "10")
    assert "must be a positive number" in fails(capsys, *start, "--bitops", "-1")
    own = ["--policy", "mptq_vit", "--mean-act-bits", "1"]
    assert "mean_act_bits is at least" in fails(capsys, *start, *own)
    assert "mean_weight_bits is at least" in fails(capsys, *start, "--mean-weight-bits", "1")
    assert "there is none: add --mean-bits" in fails(capsys, *start, "--allocate", "exact")
    assert list(tmp_path.iterdir()) == []


def test_options_change_what_the_policy_has() -> None:
    asked = Namespace(mean_bits=5.0, weight_bytes=None, bitops=None, allocate=None)
    plain = policies.ptq4vit()
    assert with_budget(plain, asked).allocation == Allocation(budget=Budget(mean_bits=5.0))
    own = Allocation(budget=Budget(bitops=10), widths=(2, 4), recheck=0)
    mixed = with_budget(policies.Policy(**{**vars(plain), "allocation": own}), asked)
    assert mixed.allocation == Allocation(budget=Budget(mean_bits=5.0), widths=(2, 4), recheck=0)
    none = Namespace(mean_bits=None, weight_bytes=None, bitops=None, allocate="greedy")
    kept = with_budget(mixed, none)
    assert kept.name == mixed.name and kept.allocation is not None
    assert kept.allocation.method is Method.GREEDY
    with pytest.raises(PolicyError, match="add --mean-bits"):
        with_budget(plain, none)

"""compile() with rotate: every step after it, every backend, saving, the gain with outliers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fxquant
from fxquant import Allocation, Budget, Compensation, LowRank, Policy, Reconstruction, policies
from fxquant.errors import PolicyError
from fxquant.testing import images, relative_error
from tests.helpers.agreement import assert_same_codes
from tests.helpers.integer_helpers import assert_integer_equals_simulation
from tests.helpers.refusals import refused
from tests.helpers.residual import outlying, points, residual
from tests.helpers.stages import canonical

ROTATED = policies.ptq4vit(4, 4, rotate=True)
STEPS: dict[str, dict[str, Any]] = {
    "Reparameterize": {"reparameterize": True},
    "SmoothWithBias": {"smooth": True},
    "CorrectBias": {"bias_correction": True},
    "Compensate": {"compensation": Compensation()},
    "AttachLowRank": {"low_rank": LowRank(rank=2)},
    "AllocateBits": {"allocation": Allocation(budget=Budget(mean_bits=5))},
    "Reconstruct": {"reconstruction": Reconstruction(iterations=4)},
}


@pytest.mark.parametrize("step", STEPS)
def test_every_later_step_runs(vit: nn.Module, step: str) -> None:
    model = fxquant.compile(vit, [images(8, 16)], replace(ROTATED, **STEPS[step]))
    assert model.report.changes["RotateResidual"] == 1
    assert model.report.changes["RotateHeads"] == 2
    assert step in model.report.changes
    assert bool(torch.isfinite(model(images(2, 16))).all())
    assert "rotate" in model.report.seconds


def test_norms_can_be_folded_afterwards(vit: nn.Module) -> None:
    changes = [
        fxquant.compile(vit, [images(8, 16)], replace(policy, reparameterize=True)).report.changes
        for policy in (ROTATED, replace(ROTATED, rotate=False))
    ]
    assert changes[0]["Reparameterize"] == changes[1]["Reparameterize"] == 3


def test_backends_agree_with_the_simulation(vit: nn.Module, tmp_path: Path) -> None:
    model = fxquant.compile(vit, [images(8, 16)], replace(policies.w8a8(), rotate=True))
    x = images(3, 16)
    assert_integer_equals_simulation(model.graph_module, model.lower("integer"), x)
    assert_same_codes(model, model.export_onnx(tmp_path / "m.onnx").path, x)
    model.save(tmp_path / "saved")
    assert torch.equal(fxquant.load(tmp_path / "saved")(x), model(x))


@pytest.mark.parametrize("step", STEPS)
def test_every_later_step_runs_on_a_rotated_hidden_layer(step: str) -> None:
    policy = replace(ROTATED, rotate_hidden=True, centre_heads=True, **STEPS[step])
    model = fxquant.compile(residual(128, 4), [points(16)], policy)
    changes = model.report.changes
    assert changes["RotateHidden"] == 2 and changes["CentreHeads"] == 4 and step in changes
    assert "centre" in model.report.seconds
    assert bool(torch.isfinite(model(points(2))).all())


@pytest.mark.parametrize("policy", [policies.w8a8(), ROTATED], ids=lambda policy: policy.name)
def test_backends_agree_on_a_rotated_hidden_layer(policy: Policy, tmp_path: Path) -> None:
    policy = replace(policy, rotate_hidden=True, centre_heads=True)
    model = fxquant.compile(residual(128, 4), [points(16)], policy)
    assert model.report.changes["RotateHidden"] == 2
    x = points(3)
    assert_integer_equals_simulation(model.graph_module, model.lower("integer"), x)
    assert_same_codes(model, model.export_onnx(tmp_path / "m.onnx").path, x)
    model.save(tmp_path / "saved")
    assert torch.equal(fxquant.load(tmp_path / "saved")(x), model(x))


def test_a_linear_at_an_output_is_quantized_too(tmp_path: Path) -> None:
    """The tokens behind the last norm are an output: one more linear undoes the rotation."""
    model = residual(16, 2, classes=0, depth=8)
    compiled = fxquant.compile(model, [points(16)], policies.minmax(rotate=True))
    assert compiled.report.changes["RotateResidual"] == 1
    names = [node.name for node in compiled.graph_module.graph.nodes]
    assert names.count("norm_unrotated") == 1
    assert_integer_equals_simulation(compiled.graph_module, compiled.lower("integer"), points(3))
    assert_same_codes(compiled, compiled.export_onnx(tmp_path / "m.onnx").path, points(3))


@pytest.mark.parametrize("bits", [4, 6])
def test_outliers_cost_less(bits: int) -> None:
    model, x = outlying(), points(32)
    errors = []
    for rotate in (False, True):
        compiled = fxquant.compile(model, [points(24)], policies.minmax(8, bits, rotate=rotate))
        with torch.no_grad():
            errors.append(float((compiled(x) - model(x)).norm() / model(x).norm()))
    assert errors[1] < 0.7 * errors[0]


def test_the_default_changes_nothing(vit: nn.Module) -> None:
    model = fxquant.compile(vit, [images(8, 16)], policies.minmax())
    assert "RotateResidual" not in model.report.changes and "rotate" not in model.report.seconds
    gm = canonical(vit, images(2, 16), seed=False)
    with torch.no_grad():
        assert relative_error(gm(images(2, 16)), vit(images(2, 16))) < 1e-5


def test_the_option_is_named() -> None:
    assert ROTATED.name == "ptq4vit_w4a4_rotated" and ROTATED.rotate
    assert policies.minmax(4, 4, rotate=True).name == "minmax_w4a4_rotated"
    text = "^rotate must be true or false, got 1$"
    with refused(PolicyError, text, got=1, expected=(True, False)):
        Policy(name="a", rules=ROTATED.rules, rotate=1)  # type: ignore[arg-type]

"""Rotations on trial: made where products get less noise, refused with the ratio elsewhere."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import fxquant
from fxquant import Rule, TensorSpec, policies
from fxquant.config.spec import Granularity, ObserverKind
from fxquant.demo import models
from fxquant.demo.glyphs import normalise, render
from tests.helpers.residual import outlying, points, residual

ALL = replace(
    policies.ptq4vit(4, 4, rotate=True),
    rotate_hidden=True,
    centre_heads=True,
    defer_softmax=True,
    trial_rotations=True,
)
ROTATIONS = ("RotateResidual", "RotateHeads", "RotateHidden")


def test_a_stream_with_an_outlying_channel_is_turned() -> None:
    seen: list[str] = []
    record = {"on_pass": lambda name, gm: seen.append(name)}
    report = fxquant.compile(outlying(), [points(24)], ALL, **record).report
    assert report.changes["RotateResidual"] == 1 and report.changes["RotateHeads"] == 4
    # What is tried calls nothing back.
    assert seen.count("RotateResidual") == seen.count("Freeze") == 1


def test_hidden_layers_with_an_outlying_channel_are_turned() -> None:
    model = residual(128, 4)
    with torch.no_grad():
        for fc1 in model.fc1:
            fc1.weight[3] *= 10
    behind_gelu = Rule(path="fc2.*", arg="input", spec=TensorSpec(bits=4))
    policy = replace(ALL, rotate=False, rules=(behind_gelu,))
    assert fxquant.compile(model, [points(24)], policy).report.changes["RotateHidden"] == 2


@pytest.mark.parametrize(("name", "bits"), [("glyph_vit", 8), ("glyph_vit", 3), ("glyph_swin", 4)])
def test_networks_without_outlying_channels_stay(name: str, bits: int) -> None:
    model, x = models.build(name), normalise(render("calib", range(8))[0])
    policy = replace(ALL, rules=policies.ptq4vit(bits, bits).rules, search=None)
    compiled = fxquant.compile(model, [x], policy)
    assert all(compiled.report.changes[step] == 0 for step in ROTATIONS)
    plain = replace(policy, rotate=False, rotate_hidden=False, trial_rotations=False)
    assert torch.equal(compiled(x), fxquant.compile(model, [x], plain)(x))


def test_the_report_says_why_nothing_was_turned() -> None:
    x = normalise(render("calib", range(8))[0])
    report = fxquant.compile(models.build("glyph_vit"), [x], replace(ALL, search=None)).report
    reasons = {note.step: note.reason for note in report.notes if note.step in ROTATIONS}
    assert all("not rotated: the noise of products would be" in r for r in reasons.values())
    asked = [reasons[step].split("and ")[1] for step in ROTATIONS]
    assert asked == ["0.85 is asked for", "0.85 is asked for", "0.75 is asked for"]


@pytest.mark.parametrize(
    "spec",
    [
        TensorSpec(bits=4, observer=ObserverKind.PERCENTILE, percentile=99.0),
        TensorSpec(bits=4, granularity=Granularity.CHANNEL),
        None,
    ],
    ids=["percentile", "per channel", "float"],
)
def test_every_kind_of_rule_can_be_tried(spec: TensorSpec | None) -> None:
    rules = (Rule(arg="rhs", spec=spec), Rule(arg="weight", spec=TensorSpec(bits=4)))
    report = fxquant.compile(outlying(), [points(24)], replace(ALL, rules=rules)).report
    assert set(ROTATIONS) <= report.changes.keys()


def test_nothing_is_tried_where_no_rotation_is_asked_for() -> None:
    policy = replace(ALL, rotate=False, rotate_hidden=False)
    report = fxquant.compile(outlying(), [points(8)], policy).report
    assert "rotate" not in report.seconds and not set(ROTATIONS) & report.changes.keys()

"""Rotations on trial: made where products get less noise, refused with the ratio elsewhere."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import fxquant
from fxquant import Rule, TensorSpec, policies
from fxquant.config.spec import ObserverKind
from fxquant.demo import models
from fxquant.demo.glyphs import normalise, render
from fxquant.passes import RotateHeads, RotateHidden, RotateResidual
from fxquant.rotation.choose import Candidate, choose_rotations
from tests.end_to_end.test_rotation import outlying
from tests.helpers.residual import points, residual
from tests.helpers.stages import canonical

ALL = replace(
    policies.ptq4vit(4, 4, rotate=True),
    rotate_hidden=True,
    centre_heads=True,
    defer_softmax=True,
    trial_rotations=True,
)
STREAM = (RotateResidual(), RotateHeads())
ANY, NONE = 1e6, 0.0


def test_a_stream_with_an_outlying_channel_is_turned() -> None:
    report = fxquant.compile(outlying(), [points(24)], ALL).report
    assert report.changes["RotateResidual"] == 1 and report.changes["RotateHeads"] == 4


def test_hidden_layers_with_an_outlying_channel_are_turned() -> None:
    model = residual(128, 4)
    with torch.no_grad():
        for fc1 in model.fc1:
            fc1.weight[3] *= 10
    behind_gelu = Rule(path="fc2.*", arg="input", spec=TensorSpec(bits=4))
    policy = replace(ALL, rotate=False, rules=(behind_gelu,))
    assert fxquant.compile(model, [points(24)], policy).report.changes["RotateHidden"] == 2


def test_networks_without_outlying_channels_stay_and_the_report_says_why() -> None:
    model, x = models.build("glyph_vit"), normalise(render("calib", range(8))[0])
    compiled = fxquant.compile(model, [x], replace(ALL, search=None))
    names = ("RotateResidual", "RotateHeads", "RotateHidden")
    assert all(compiled.report.changes[name] == 0 for name in names)
    reasons = {note.step: note.reason for note in compiled.report.notes if note.step in names}
    assert all("not rotated: the noise of products would be" in r for r in reasons.values())
    asked = [reasons[name].split("and ")[1] for name in names]
    assert asked == ["0.85 is asked for", "0.85 is asked for", "0.75 is asked for"]
    plain = replace(ALL, search=None, rotate=False, rotate_hidden=False, trial_rotations=False)
    assert torch.equal(compiled(x), fxquant.compile(model, [x], plain)(x))


def test_other_observers_keep_their_ranges() -> None:
    spec = TensorSpec(bits=4, observer=ObserverKind.PERCENTILE, percentile=99.0)
    rule = Rule(arg="input", spec=spec)
    report = fxquant.compile(outlying(), [points(24)], replace(ALL, rules=(rule,))).report
    assert report.changes["RotateResidual"] == 1


@pytest.mark.parametrize("first", [ANY, NONE])
def test_each_candidate_is_tried_on_top_of_those_made(first: float) -> None:
    gm = canonical(outlying(128), points(), seed=False)
    state = {name: value.clone() for name, value in gm.state_dict().items()}
    code = gm.code
    candidates = [Candidate(STREAM, first), Candidate((RotateHidden(),), NONE)]
    decisions = choose_rotations(gm, ALL, points(16), candidates)
    assert [candidate for candidate, _ in decisions] == candidates
    assert [refusal is None for _, refusal in decisions] == [first == ANY, False]
    alone = choose_rotations(gm, ALL, points(16), [Candidate((RotateHidden(),), NONE)])
    assert (str(alone[0][1]) == str(decisions[1][1])) == (first == NONE)
    assert gm.code == code and state.keys() == gm.state_dict().keys()
    assert all(torch.equal(value, gm.state_dict()[name]) for name, value in state.items())

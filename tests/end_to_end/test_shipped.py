"""The trained example models: every runtime computes what the simulation does."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

import fxquant
from fxquant import CompiledModel
from fxquant.backends.onnx_qdq import make_session
from fxquant.demo.glyphs import GlyphDataset
from fxquant.demo.models import NAMES, build
from tests.helpers.agreement import assert_same_codes
from tests.helpers.integer_helpers import assert_integer_equals_simulation

TEST_IMAGES = 400


@cache
def held_out() -> tuple[Tensor, Tensor]:
    return next(iter(DataLoader(GlyphDataset("test", TEST_IMAGES), batch_size=TEST_IMAGES)))


@cache
def compiled(name: str) -> CompiledModel:
    loader = DataLoader(GlyphDataset("calib", 32), batch_size=16)
    return fxquant.compile(build(name), loader, "w8a8")


@cache
def floating(name: str) -> Tensor:
    with torch.no_grad():
        return torch.cat([build(name)(part) for part in held_out()[0].split(50)])


def top1(logits: Tensor) -> float:
    return float((logits.argmax(1) == held_out()[1]).float().mean())


@cache
def simulated(name: str) -> Tensor:
    with torch.no_grad():
        return torch.cat([compiled(name)(part) for part in held_out()[0].split(50)])


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_eight_bits_keep_the_accuracy(name: str) -> None:
    assert top1(floating(name)) > 0.6
    assert abs(top1(simulated(name)) - top1(floating(name))) < 0.015


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_integers_alone_keep_the_accuracy(name: str) -> None:
    loader = DataLoader(GlyphDataset("calib", 32), batch_size=16)
    full = fxquant.compile(build(name), loader, "w8a8_full")
    # Floats that carry the same integers; backends/integer/test_integer_only.py compares and counts
    # floats.
    executor = full.lower("integer", integer_only=True, float_products=True)
    with torch.no_grad():
        result = torch.cat([executor(part) for part in held_out()[0].split(50)])
    assert top1(floating(name)) - top1(result) <= 0.01


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_onnxruntime_agrees_with_the_simulation(name: str, tmp_path: Path) -> None:
    exported = compiled(name).export_onnx(tmp_path / "model.onnx")
    assert exported.unfused == ()
    session = make_session(exported.path)
    parts = [session.run(None, {"images": p.numpy()})[0] for p in held_out()[0].split(50)]
    result = torch.cat([torch.from_numpy(part) for part in parts])
    same = (result.argmax(1) == simulated(name).argmax(1)).float().mean()
    assert float(same) >= 0.995
    assert_same_codes(compiled(name), exported.path, held_out()[0][:20])


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_integer_kernels_agree_with_the_simulation(name: str) -> None:
    lowered = compiled(name).lower("integer")
    images = held_out()[0][:50]
    with torch.no_grad():
        result = lowered(images)
    same = (result.argmax(1) == simulated(name)[:50].argmax(1)).float().mean()
    assert float(same) >= 0.97  # one image of fifty may sit on the boundary between two classes
    assert_integer_equals_simulation(compiled(name).graph_module, lowered, images[:8])

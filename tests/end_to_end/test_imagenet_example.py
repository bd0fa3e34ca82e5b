"""The ImageNet script, on a folder of small made-up images and a model without weights."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
import timm

from tests.helpers.cli_helpers import draw_classes

SCRIPT = Path(__file__).parents[2] / "examples" / "imagenet.py"


def test_checkpoints_of_the_paper_are_known_to_timm() -> None:
    for row in runpy.run_path(str(SCRIPT))["PAPER"].values():
        assert (
            timm.is_model(row.tag) and timm.get_pretrained_cfg(row.tag).tag == row.tag.split(".")[1]
        )


@pytest.mark.slow
def test_it_prints_float_and_quantized_beside_the_paper(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for split in ("train", "val"):
        draw_classes(tmp_path / split)
    command = [str(SCRIPT), "--data", str(tmp_path), "--models", "DeiT-S", "--methods", "minmax"]
    command += ["--random-weights", "--calibration", "4", "--workers", "0", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", command)
    runpy.run_path(str(SCRIPT), run_name="__main__")
    printed = capsys.readouterr().out
    assert "79.8" in printed and printed.count("minmax") == 2

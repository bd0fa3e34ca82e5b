"""The scripts in ``benchmarks`` and ``examples``: each can be imported, and explains itself."""

from __future__ import annotations

import runpy
import sys
from argparse import Namespace
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted([*(ROOT / "benchmarks").glob("*.py"), *(ROOT / "examples").glob("*.py")])
SCRIPTS = [path for path in FILES if "__main__" in path.read_text(encoding="utf-8")]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_help_is_printed_and_nothing_runs(
    script: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(script.parent)  # where Python looks when it runs a script
    monkeypatch.setattr(sys, "argv", [str(script), "--help"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(script), run_name="__main__")
    assert end.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: {script.name}")


def fails(
    script: str,
    *arguments: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> str:
    """What a script that refuses its arguments writes."""
    path = ROOT / script
    monkeypatch.syspath_prepend(path.parent)
    monkeypatch.setattr(sys, "argv", [str(path), *arguments])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(path), run_name="__main__")
    assert end.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("script", ["accuracy", "integer_only", "low_rank"])
@pytest.mark.parametrize("option", ["--images", "--draws", "--calibration"])
def test_benchmarks_refuse_to_measure_nothing(
    script: str,
    option: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    name = f"benchmarks/{script}.py"
    said = fails(name, option, "0", monkeypatch=monkeypatch, capsys=capsys)
    assert f"argument {option}: must be at least 1, got 0" in said


def test_the_ablation_refuses_a_width_that_no_method_has(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "benchmarks/accuracy.py"
    said = fails(name, "--widths", "1", monkeypatch=monkeypatch, capsys=capsys)
    assert "argument --widths: invalid choice: 1 (choose from" in said


@pytest.mark.parametrize(
    ("changes", "name", "mean_bits", "trains"),
    [
        ({"policy": "best", "mean_bits": 5}, "best_mixed_seconds", 5, True),
        ({"policy": "best", "bits": 4, "effort": "minutes"}, "best_w4a4_minutes", None, True),
        ({"policy": "ptq4vit", "mean_bits": 4}, "ptq4vit_w8a8", 4, False),
        ({"policy": "ptq4vit", "mean_bits": 4, "brute_force": True}, "ptq4vit_w8a8", None, False),
        ({"policy": "w8a8"}, "w8a8", None, False),
    ],
)
def test_compile_time_measures_the_policy_of_the_command_line(
    changes: dict[str, object],
    name: str,
    mean_bits: float | None,
    trains: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = ROOT / "benchmarks" / "compile_time.py"
    monkeypatch.syspath_prepend(path.parent)
    defaults = {"bits": None, "mean_bits": None, "effort": None, "brute_force": False}
    policy = runpy.run_path(str(path))["recipe"](Namespace(**{**defaults, **changes}))
    assert policy.name == name and (policy.reconstruction is not None) == trains
    assert (policy.allocation and policy.allocation.budget.mean_bits) == mean_bits


@pytest.mark.parametrize("made", [(), ("train/cat",), ("train", "val/cat")])
def test_imagenet_looks_at_the_data_before_it_downloads(
    made: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("weights were asked for")

    monkeypatch.setattr("timm.create_model", never)
    for folder in made:
        (tmp_path / folder).mkdir(parents=True)
    said = fails(
        "examples/imagenet.py", "--data", str(tmp_path), monkeypatch=monkeypatch, capsys=capsys
    )
    missing = "val" if made == ("train/cat",) else "train"
    assert f"--data: {tmp_path / missing} is to hold a folder of images for each class" in said


def test_a_session_needs_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = str(tmp_path / "model.onnx")
    said = fails("benchmarks/session.py", missing, monkeypatch=monkeypatch, capsys=capsys)
    assert f"no file {missing}" in said

"""Results of benchmarks as JSON: written, read back, and those in the repository."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
RESULTS: dict[str, Any] = runpy.run_path(str(ROOT / "benchmarks" / "results.py"))
STORED = sorted((ROOT / "benchmarks" / "results").glob("*.json"))
FLAGS = {"avx2", "avx512_vnni", "amx_int8"}


def test_the_machine_is_named() -> None:
    machine = RESULTS["machine"](threads=2)
    assert machine["cpu"] and machine["cores"] >= 1 and machine["threads"] == 2
    assert set(machine["flags"]) == FLAGS
    assert {"fxquant", "torch", "onnxruntime", "numpy"} <= machine["versions"].keys()


def test_rows_come_back_with_the_machine(tmp_path: Path) -> None:
    path, rows = tmp_path / "new" / "sizes.json", [{"model": "vit", "bits": 4}]
    RESULTS["write_results"](path, "sizes", {"out": path, "widths": [4]}, rows, threads=1)
    values = RESULTS["read_results"](path)
    assert values["benchmark"] == "sizes" and values["rows"] == rows
    assert values["options"] == {"out": str(path), "widths": [4]}
    assert values["machine"] == RESULTS["machine"](threads=1)


@pytest.mark.parametrize("text", ["[]", "{}", '{"format": 0}', "no JSON"])
def test_other_files_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ValueError):
        RESULTS["read_results"](tmp_path / "x.json")


def test_results_are_stored() -> None:
    assert "import_time" in {path.stem for path in STORED}


@pytest.mark.parametrize("path", STORED, ids=lambda path: path.stem)
def test_stored_results_name_their_benchmark_and_machine(path: Path) -> None:
    values = RESULTS["read_results"](path)
    assert (ROOT / "benchmarks" / f"{values['benchmark']}.py").exists()
    assert values["rows"] and set(values["machine"]["flags"]) == FLAGS
    assert json.loads(path.read_text()) == values

"""Results of benchmarks as JSON, with the machine that they were measured on."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from fxquant._version import __version__

FORMAT = 1
# Instruction sets that the speed and the exactness of integer kernels depend on.
_FLAGS = ("avx2", "avx512_vnni", "amx_int8")
_PACKAGES = ("torch", "onnxruntime", "onnx", "timm", "numpy")


def machine(threads: int | None = None) -> dict[str, Any]:
    """The machine and the versions that a figure depends on, as plain JSON values.

    Args:
        threads: number of threads of the benchmark; None where the benchmark does not set it.

    Returns:
        ``cpu`` (its name), ``flags`` (whether the CPU has each of avx2, avx512_vnni, amx_int8),
        ``cores``, ``threads``, ``python`` and ``versions`` of installed packages.
    """
    name, flags = _cpu()
    versions = {package: found for package in _PACKAGES if (found := _version(package))}
    return {
        "cpu": name,
        "flags": {flag: flag in flags for flag in _FLAGS},
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "threads": threads,
        "python": platform.python_version(),
        "versions": {"fxquant": __version__, **versions},
    }


def write_results(
    path: Path,
    benchmark: str,
    options: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    threads: int | None = None,
) -> None:
    """Writes the rows of a table, and the machine that they were measured on.

    Args:
        path: the JSON file; its folder is created.
        benchmark: name of the script.
        options: options of the script; paths are written as text.
        rows: rows of the table, one dict per row.
        threads: number of threads, as in :func:`machine`.
    """
    values = {
        "format": FORMAT,
        "benchmark": benchmark,
        "machine": machine(threads),
        "options": dict(options),
        "rows": [dict(row) for row in rows],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values, indent=1, default=str) + "\n", encoding="utf-8")


def read_results(path: Path) -> dict[str, Any]:
    """Reads a file that :func:`write_results` wrote.

    Raises:
        ValueError: the file is not of this format.
    """
    values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise ValueError(f"{path} does not hold results of format {FORMAT}")
    return values


def _cpu() -> tuple[str, set[str]]:
    """Name and flags of the CPU; without flags where the system does not list them."""
    file = Path("/proc/cpuinfo")
    if not file.exists():
        return platform.processor() or platform.machine(), set()
    lines = [line.partition(":") for line in file.read_text(encoding="utf-8").splitlines()]
    fields = {key.strip(): value.strip() for key, _, value in lines}
    return fields.get("model name", platform.machine()), set(fields.get("flags", "").split())


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None

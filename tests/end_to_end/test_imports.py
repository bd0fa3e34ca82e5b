"""What is imported when: modules are loaded on use."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys

import pytest

import fxquant

HEAVY = {"matplotlib", "onnx", "onnxruntime", "onnxscript", "scipy", "sympy", "timm", "torchvision"}
IMPORTS = {
    "import fxquant": "import fxquant",
    "errors": "import fxquant; fxquant.errors.PolicyError",
}
COMMANDS = (["--help"], ["--version"], ["policies", "--help"], ["compile", "--help"])


def modules_after(code: str) -> set[str]:
    """Top-level packages that are loaded once ``code`` has run in a new interpreter."""
    show = "import json, sys; print(json.dumps(sorted({m.split('.')[0] for m in sys.modules})))"
    run = [sys.executable, "-c", f"{code}\n{show}"]
    done = subprocess.run(run, check=True, capture_output=True, text=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


def after_command(*arguments: str) -> set[str]:
    """The same, for the command line, which may exit."""
    call = f"main({list(arguments)!r})"
    code = (
        f"from fxquant.cli import main\ntry: {call}\nexcept SystemExit as end: assert not end.code"
    )
    return modules_after(code)


@pytest.mark.parametrize("code", IMPORTS.values(), ids=IMPORTS)
def test_the_package_alone_imports_no_torch(code: str) -> None:
    assert not modules_after(code) & {*HEAVY, "torch", "numpy", "rich", "yaml"}


def test_the_compiler_imports_no_backend_and_no_solver() -> None:
    loaded = modules_after(f"from fxquant import {', '.join(fxquant.__all__)}")
    assert "torch" in loaded
    assert not loaded & HEAVY


@pytest.mark.parametrize("arguments", COMMANDS, ids=" ".join)
def test_help_and_version_import_no_torch(arguments: list[str]) -> None:
    assert not after_command(*arguments) & {*HEAVY, "torch"}


def test_listing_the_presets_imports_no_model_zoo() -> None:
    assert not after_command("policies") & HEAVY


@pytest.mark.parametrize("name", fxquant.__all__)
def test_public_names_are_found_and_stay_the_same(name: str) -> None:
    value = getattr(fxquant, name)
    assert value is getattr(fxquant, name)
    assert name in dir(fxquant)
    if hasattr(value, "__module__"):
        assert getattr(importlib.import_module(value.__module__), name) is value


def test_other_names_are_not_there() -> None:
    with pytest.raises(AttributeError, match="module 'fxquant' has no attribute 'compiles'"):
        _ = fxquant.compiles  # type: ignore[attr-defined]
    assert not hasattr(fxquant, "torch")

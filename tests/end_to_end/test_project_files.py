"""Files about the project agree with the package and with one another."""

from __future__ import annotations

import configparser
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

import fxquant
from fxquant.compiled.storage import FORMAT
from fxquant.config.allocation import Allocation
from fxquant.config.recovery import Compensation, Reconstruction
from fxquant.config.renamed import new_names_of
from fxquant.config.scale_search import ScaleSearch

ROOT = Path(__file__).parents[2]
TEMPLATES = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))


def text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def requirement(package: str) -> str:
    """The oldest version that setup.cfg admits."""
    config = configparser.ConfigParser()
    config.read_string(text("setup.cfg"))
    found = re.search(rf"^{package} >= ([\d.]+)$", config["options"]["install_requires"], re.M)
    assert found is not None
    return found[1]


def test_the_hosted_workflow_runs_everything_on_the_oldest_and_newest_versions() -> None:
    workflow: dict[Any, Any] = yaml.safe_load(text(".github/workflows/ci.yml"))
    job = workflow["jobs"]["check"]
    matrix = job["strategy"]["matrix"]
    assert matrix["python"] == ["3.11", "3.12", "3.13"]
    assert matrix["torch"] == [f"=={requirement('torch')}.*", "latest"]
    assert matrix["onnxruntime"] == [f"=={requirement('onnxruntime')}.*", "latest"]
    assert job["steps"][-1] == {"run": "bash .ci/run"}


def test_hooks_for_commits_are_those_of_the_checks() -> None:
    config = yaml.safe_load(text(".pre-commit-config.yaml"))
    hooks = {hook["id"] for repo in config["repos"] for hook in repo["hooks"]}
    assert hooks == {"ruff", "ruff-format", "mypy", "end-of-file-fixer", "check-yaml"}


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
def test_issue_templates_are_forms(path: Path) -> None:
    form = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert form["name"] and form["description"]
    ids = [item["id"] for item in form["body"]]
    assert len(ids) == len(set(ids))
    if path.stem == "bug":
        assert {"model", "policy", "versions", "report"} <= set(ids)


def test_the_version_is_named_alike_everywhere() -> None:
    citation = yaml.safe_load(text("CITATION.cff"))
    assert citation["version"] == fxquant.__version__
    assert f"## [{fxquant.__version__}]" in text("CHANGELOG.md")
    assert "## [Unreleased]" in text("CHANGELOG.md")


def test_public_names_are_those_that_the_page_lists() -> None:
    page = text("docs/stability.md")
    exported = page[page.index("The names that") : page.index("Public attributes")]
    assert re.findall(r"`(\w+)`", exported)[1:] == fxquant.__all__
    assert f"at present {FORMAT}." in page
    named = re.findall(r"`(\w+)`(?:,| and|\n| in)", page[page.index("The options of") :])
    assert {"ScaleSearch", "Scope", "Method"} <= set(named)


def test_deprecated_options_are_in_the_changelog() -> None:
    changes = text("CHANGELOG.md")
    for cls in (ScaleSearch, Compensation, Reconstruction, Allocation):
        for old, new in new_names_of(cls).items():
            assert f"`{cls.__name__}.{old}`" in changes and f"`{cls.__name__}.{new}`" in changes

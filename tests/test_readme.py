"""README and docs: their Python and YAML run, and links, rows and files that they name exist."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

import fxquant
from fxquant.policy_file import read_policy
from fxquant.testing import images

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
TEXT = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE)


@pytest.mark.slow
def test_the_quickstart_runs_as_pasted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quickstart.py").write_text(blocks("python")[0])
    names = runpy.run_path("quickstart.py")
    simulated, executed = (names[key] for key in ("qm", "model"))
    x = names["images"]
    assert (simulated(x).argmax(1) == executed(x).argmax(1)).float().mean() > 0.7
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "folder",
        "model.onnx",
        "quickstart.py",
    ]


@pytest.mark.parametrize("code", blocks("python")[1:])
def test_snippets_run_behind_the_quickstart(
    code: str, vit: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "snippet.py").write_text(code)
    before = {"fxquant": fxquant, "model": vit, "loader": [images(4, 16)]}
    assert isinstance(runpy.run_path("snippet.py", before)["policy"], fxquant.Policy)


@pytest.mark.parametrize("text", blocks("yaml"))
def test_policies_in_yaml_compile(text: str, vit: object, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(text)
    policy = read_policy(tmp_path / "mine.yaml")
    assert fxquant.compile(vit, [images(4, 16)], policy).report.policy == policy.name


def test_methods_named_in_the_text_are_those_of_the_ablation() -> None:
    methods = runpy.run_path(str(ROOT / "benchmarks" / "recipes.py"))["methods"]
    known = methods(8).keys() | methods(4).keys()
    named = set(re.findall(r"`(\+ [^`]+)`", TEXT.replace("\n", " ")))
    assert named and named <= known, named - known


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_commands_lead_to_what_is_there(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    links = re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]+))?\)", text)
    for target, section in links:
        found = page.parent / target if target else page
        assert found.exists(), target
        titles = re.findall(r"^#+ (.+)$", found.read_text(encoding="utf-8"), re.MULTILINE)
        anchors = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
        assert not section or section in anchors, (section, anchors)
    scripts = re.findall(r"(?:benchmarks|examples|tests)/\w+\.py", text)
    assert links or scripts
    for script in scripts:
        assert (ROOT / script).exists(), script

"""README and docs: their Python and YAML run, and links, rows and files that they name exist."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

import fxquant
from fxquant.policies.policy_file import read_policy
from fxquant.testing import images

ROOT = Path(__file__).parents[2]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
FOR_DEVELOPERS = (ROOT / "ARCHITECTURE.md", ROOT / "CONTRIBUTING.md")
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
    recipes = runpy.run_path(str(ROOT / "benchmarks" / "recipes.py"))
    known = {name for bits in (8, 6, 5, 4, 3) for name in recipes["methods"](bits)}
    known |= set(recipes["REAL_METHODS"])
    text = TEXT.replace("\n", " ")
    asked = {
        name
        for names in re.findall(r'--methods ((?:"[^"]+" ?)+)', text)
        for name in re.findall(r'"([^"]+)"', names)
    }
    named = set(re.findall(r"`(\+ [^`]+)`", text)) | asked
    assert len(asked) > 10 and named <= known, named - known


def tables() -> dict[tuple[str, str, str], list[float]]:
    """Points of top-1 lost against float32, by model, method and width: in order of the page."""
    found: dict[tuple[str, str, str], list[float]] = {}
    model, float32, widths = "", 0.0, list[str]()
    for line in (ROOT / "docs" / "results.md").read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in re.split("[┃│]", line)[1:-1]]
        head = re.match(r"(\w+), (?:top-1, float32 ([\d.]+) %|KL)", cells[0]) if cells else None
        if head:
            model, float32, widths = head[1], float(head[2] or "nan"), cells[1:]
        elif model and cells and "(" in cells[-1]:
            for width, cell in zip(widths, cells[1:], strict=True):
                lost = float32 - float(cell.split(" ")[0])
                found.setdefault((model, cells[0], width), []).append(lost)
    return found


def test_what_readme_says_is_gained_is_in_the_results() -> None:
    found = tables()
    text = PAGES[0].read_text(encoding="utf-8")
    rows = re.findall(
        r"^\| `(ptq4vit|best)`(?:, `effort=\"(\w+)\"`)? \|(.+)\|$", text, re.MULTILINE
    )
    rows = [row for row in rows if re.search(r"\d\.\d", row[2])]
    assert len(rows) == 3
    for preset, effort, cells in rows:
        _, *lost = (float(cell.replace(",", "")) for cell in cells.split("|"))
        method = f"best, {effort}" if effort else "+ both"
        edges = [(m, method, w) for m in ("glyph_vit", "glyph_swin") for w in ("W4A4", "W3A3")]
        for edge, points in zip(edges, lost, strict=True):
            # Printed to a tenth, as is float32's top-1.
            assert any(abs(one - points) < 0.11 for one in found[edge]), (preset, edge, points)


@pytest.mark.parametrize("page", [*PAGES, *FOR_DEVELOPERS], ids=lambda page: page.name)
def test_files_that_pages_name_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    # The package itself may lie elsewhere: CI tests the installed wheel.
    tops = [Path(fxquant.__file__).parent, *(ROOT / t for t in ("tests", "benchmarks", "examples"))]
    own = [str(path.relative_to(top.parent)) for top in tops for path in top.rglob("*.py")]
    named = set(re.findall(r"(?<![\w./])((?:\w+/)*\w+\.py)\b", text))
    own_words = {"quickstart.py", "mine.py"}
    missing = [
        name for name in named - own_words if not any(f"/{p}".endswith(f"/{name}") for p in own)
    ]
    assert not missing


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
    scripts = re.findall(r"(?:benchmarks|examples|tests)/(?:\w+/)*\w+\.py", text)
    assert links or scripts
    for script in scripts:
        assert (ROOT / script).exists(), script

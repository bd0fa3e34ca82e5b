"""Words of the prose: plain ones in docstrings, comments, messages and pages.

``tests/test_structure.py`` checks the words that docstrings begin with.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

import fxquant

ROOT = Path(__file__).parents[2]
PACKAGE = Path(fxquant.__file__).parent  # CI tests the installed wheel
SCRIPTS = [*ROOT.glob("benchmarks/*.py"), *ROOT.glob("examples/*.py")]
SOURCES = sorted([*PACKAGE.rglob("*.py"), *SCRIPTS])
TESTS = sorted(ROOT.glob("tests/**/*.py"))
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])

# Pattern of each word that is not plain English, and the plain words in its place.
PLAIN_WORDS = {
    r"anew": "again",
    r"weighed": "weighted",
    r"beside": "next to",
    # Right are: "there is no model", "is no longer".
    r"(?<!there )(?:is|are|was|were) no(?! (?:longer|more)\b)": "is not a",
    # Right are: "so that", "so far", "so small that", "and so on", and ", so" between two clauses.
    r"(?<!, )(?<![.\w])so(?! (?:that|far|on|few|large|long|many|much|often|small)\b)(?![.-]\w)": (
        "in this way, therefore"
    ),
}


def not_plain(text: str) -> Iterator[str]:
    """Words of a text that are not plain, each in its place and with the plain words."""
    line = " ".join(text.split())
    for pattern, plain in PLAIN_WORDS.items():
        for match in re.finditer(rf"\b{pattern}\b", line, re.IGNORECASE):
            place = line[max(0, match.start() - 40) : match.end() + 20]
            yield f"“{match[0]}” in “{place}”: write “{plain}”"


def prose(source: str, *, messages: bool) -> Iterator[str]:
    """Comments and docstrings of Python source; with its messages, all strings of it."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Constant(value=str(text)) if messages:
                yield text
            case ast.Module() | ast.ClassDef() | ast.FunctionDef() | ast.AsyncFunctionDef():
                yield ast.get_docstring(node) or ""
    yield comments(source)


def comments(source: str) -> str:
    """All comments of Python source; a comment of several lines is one sentence or more."""
    text, previous = "", 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            line = token.start[0]
            text += ("" if line == previous + 1 else " | ") + token.string.lstrip("#")
            previous = line
    return text


def ids(path: Path) -> str:
    top = PACKAGE.parent if path.is_relative_to(PACKAGE) else ROOT
    return str(path.relative_to(top))


@pytest.mark.parametrize("path", [*SOURCES, *TESTS], ids=ids)
def test_code_has_plain_words(path: Path) -> None:
    # Strings of tests are data, such as names of cases and wrong words on purpose.
    texts = prose(path.read_text(encoding="utf-8"), messages=path in SOURCES)
    assert not {problem for text in texts for problem in not_plain(text)}


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_pages_have_plain_words(page: Path) -> None:
    assert not list(not_plain(page.read_text(encoding="utf-8")))


@pytest.mark.parametrize(
    "text",
    [
        "The file is written anew.",
        "Rows are weighed by their gradient.",
        "A branch beside each linear.",
        "A slice is no move.",
        "Outputs that are no\nlogits.",
        "The policy leaves it float, and the report says so.",
        "So the zero_point is even.",
        "Streams are joined, and so do norms.",
    ],
)
def test_words_that_are_not_plain_are_seen_everywhere(text: str) -> None:
    assert len(list(not_plain(text))) == 1
    comment = "".join(f"# {line}\n" for line in text.splitlines())
    for source in (f'"""{text}"""', f'def run():\n    """{text}"""', f"x = 1\n{comment}"):
        for messages in (False, True):
            assert any(list(not_plain(piece)) for piece in prose(source, messages=messages))
    message = f"raise ValueError({text!r})"
    assert any(list(not_plain(piece)) for piece in prose(message, messages=True))
    assert not any(list(not_plain(piece)) for piece in prose(message, messages=False))


@pytest.mark.parametrize(
    "text",
    [
        "There is no such model, and there are no images.",
        "The option is no longer accepted.",
        "It folds scales so that the product stays an integer product.",
        "The least loss so far; accumulators so large that they overflow.",
        "Older vector units may saturate, so it is not used there.",
        "Names of outputs: `output 0`, `output 1` and so on; `libc.so.6`; besides.",
    ],
)
def test_plain_words_are_not_refused(text: str) -> None:
    assert not list(not_plain(text))

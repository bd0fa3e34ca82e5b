"""The shape of the source: import direction, sizes, documentation."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import fxquant
from fxquant.graph.meta import KEYS

PACKAGE = Path(fxquant.__file__).parent
SOURCES = sorted(PACKAGE.rglob("*.py"))
HERE = Path(__file__).parent
SCRIPTS = sorted(
    path for name in ("benchmarks", "examples") for path in HERE.parent.glob(f"{name}/*.py")
)
TESTS = sorted(path for path in HERE.rglob("*.py") if path.name != "__init__.py")
# Folders of tests that mirror no room of the package.
CROSS_CUTTING = ("end_to_end", "helpers")

# Rooms (modules and folders at the package's root) by floor. A room imports rooms of lower floors,
# never one of its own.
FLOORS = {
    1: "errors _version",
    2: "utils config",
    3: "quantizers",
    4: "search observers",
    5: "graph",
    6: "policies calibration backends",
    7: "smoothing rotation mixed_precision reconstruction",
    8: "passes compiled",
    9: "compiler testing demo",
    10: "__init__ cli model",
    11: "__main__",
}
FLOOR = {room: floor for floor, rooms in FLOORS.items() for room in rooms.split()}
# Rooms of lower floors that a room does not import all the same.
NEVER = {
    "backends": ("search", "observers"),
    "smoothing": ("backends",),
    "rotation": ("backends",),
    "mixed_precision": ("backends",),
    "reconstruction": ("backends",),
    "passes": ("backends",),
}
# Words that begin no docstring: a docstring begins with a noun or a verb.
OPENERS = """
Of Those That So What As Like Whose Which Where It They These This There No None Some
In On By At From For With Not If How Why Who See Its Their Also
"""
FORBIDDEN_OPENERS = frozenset(OPENERS.split())
ONNX = {"onnx", "onnxruntime", "onnxscript", "onnx_ir"}
MODEL_ZOOS = {"timm", "torchvision"}


def room(path: Path) -> str:
    """The module or folder directly below the package that a file belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """Each imported module by its full name, and whether it is imported when the file is."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    deferred = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        or (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, id(node) not in deferred) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            module = node.module or ""
            if module == "fxquant":  # from fxquant import ops
                yield from ((f"fxquant.{a.name}", id(node) not in deferred) for a in node.names)
            else:
                yield module, id(node) not in deferred


def used_rooms(path: Path, *, on_import_only: bool = False) -> set[str]:
    """Parts of the package that a file imports from."""
    return {
        name.split(".")[1]
        for name, on_import in imports(path)
        if name.startswith("fxquant.") and (on_import or not on_import_only)
    }


def ids(path: Path) -> str:
    if path.is_relative_to(PACKAGE):
        return str(path.relative_to(PACKAGE.parent))
    return str(path.relative_to(HERE if path.is_relative_to(HERE) else HERE.parent))


def test_every_room_has_a_floor() -> None:
    assert {room(path) for path in SOURCES} == FLOOR.keys()


@pytest.mark.parametrize("path", SOURCES, ids=ids)
def test_rooms_import_lower_floors_alone(path: Path) -> None:
    own = room(path)
    wrong = {
        used
        for used in used_rooms(path) - {own}
        if FLOOR[used] >= FLOOR[own] or used in NEVER.get(own, ())
    }
    assert not wrong, f"{own} must not import {sorted(wrong)}"


@pytest.mark.parametrize("path", SOURCES, ids=ids)
def test_backends_are_imported_on_use(path: Path) -> None:
    if room(path) != "backends":
        assert "backends" not in used_rooms(path, on_import_only=True)


@pytest.mark.parametrize("path", sorted((PACKAGE / "passes").rglob("*.py")), ids=ids)
def test_passes_do_not_import_each_other(path: Path) -> None:
    if path.name in ("__init__.py", "canonicalize.py"):
        return
    others = {name for name, _ in imports(path) if name.startswith("fxquant.passes")}
    assert others <= {"fxquant.passes.base"}


@pytest.mark.parametrize("path", SOURCES, ids=ids)
def test_heavy_packages_stay_where_they_belong(path: Path) -> None:
    packages = {name.split(".")[0] for name, _ in imports(path)}
    if "onnx_qdq" not in path.parts and room(path) != "cli":
        assert not packages & ONNX
    if room(path) not in ("cli", "cli_model", "demo"):
        assert not packages & MODEL_ZOOS
    assert not packages & {"passes", "backends", "tests"}


def literal_meta_keys(tree: ast.AST) -> Iterator[str]:
    """String literals by which code reads or writes an entry of something named ``meta``."""
    for node in ast.walk(tree):
        match node:
            case ast.Subscript(value=holder, slice=key):
                keys = [key]
            case ast.Call(func=ast.Attribute(value=holder), args=keys):
                pass
            case ast.Compare(left=key, comparators=[holder]):
                keys = [key]
            case ast.AugAssign(target=holder, value=ast.Dict(keys=keys)):
                pass
            case _:
                continue
        if ast.unparse(holder).split(".")[-1] == "meta":
            yield from (k.value for k in keys if isinstance(k, ast.Constant))


@pytest.mark.parametrize("path", [p for p in SOURCES if p.name != "meta.py"], ids=ids)
def test_keys_in_meta_are_named_once(path: Path) -> None:
    literals = set(literal_meta_keys(ast.parse(path.read_text(encoding="utf-8"))))
    assert not literals & {key.name for key in KEYS}, "use the constant of fxquant/graph/meta.py"


@pytest.mark.parametrize(
    "line",
    [
        'gm.meta["stage"] = 1',
        'node.meta.get("quant", {})',
        '"packed" in edge.node.meta',
        'gm.meta |= {"codes": 1}',
    ],
)
def test_literal_keys_in_meta_are_seen(line: str) -> None:
    assert set(literal_meta_keys(ast.parse(line))) & {key.name for key in KEYS}


def test_every_key_in_meta_is_listed() -> None:
    tree = ast.parse((PACKAGE / "graph" / "meta.py").read_text(encoding="utf-8"))
    names = [
        node.value.args[0].value
        for node in tree.body
        if isinstance(node, ast.AnnAssign) and isinstance(node.value, ast.Call)
    ]
    assert names == [key.name for key in KEYS] and len(set(names)) == len(names)


def test_tests_mirror_the_package() -> None:
    folders = {path.parent for path in TESTS} - {HERE}
    for folder in (path.relative_to(HERE) for path in folders):
        assert (HERE / folder / "__init__.py").is_file(), f"tests/{folder} is not a package"
        assert folder.parts[0] in CROSS_CUTTING or (PACKAGE / folder).is_dir(), (
            f"tests/{folder} mirrors no folder of fxquant: name it for the room that it tests"
        )


@pytest.mark.parametrize("path", TESTS, ids=ids)
def test_files_of_tests_lie_in_a_room_and_helpers_in_one_folder(path: Path) -> None:
    if path.parent == HERE:
        modules = {f"test_{module.name}" for module in PACKAGE.glob("*.py")}
        assert path.name in {"conftest.py", Path(__file__).name} | modules
    else:
        assert path.name.startswith("test_") == ("helpers" not in path.parts)


@pytest.mark.parametrize("path", TESTS, ids=ids)
def test_tests_do_not_import_each_other(path: Path) -> None:
    imported = {name for name, _ in imports(path) if name.startswith("tests.")}
    assert all(name.startswith("tests.helpers") for name in imported)


@pytest.mark.parametrize("path", [*SOURCES, *TESTS], ids=ids)
def test_files_and_functions_are_short(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 350
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            assert node.end_lineno - node.lineno < 80, f"{node.name} is too long"


@pytest.mark.parametrize("path", [p for p in SOURCES if p.stat().st_size], ids=ids)
def test_every_public_name_is_documented(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree), "the module has no docstring"
    for holder in (tree, *(n for n in tree.body if isinstance(n, ast.ClassDef))):
        if isinstance(holder, ast.ClassDef) and holder.name.startswith("_"):
            continue
        for node in holder.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                assert ast.get_docstring(node), f"{node.name} has no docstring"


def badly_opened_docstrings(tree: ast.AST) -> Iterator[str]:
    """Docstrings, by name of their owner, that begin with one of ``FORBIDDEN_OPENERS``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node) or ""
            words = docstring.split(maxsplit=1)
            if words and words[0].strip("`'\"*([.,:;)]").capitalize() in FORBIDDEN_OPENERS:
                yield f"{getattr(node, 'name', 'module')}: {docstring.splitlines()[0]}"


@pytest.mark.parametrize("path", [*SOURCES, *SCRIPTS], ids=ids)
def test_docstrings_begin_with_a_noun_or_a_verb(path: Path) -> None:
    bad = list(badly_opened_docstrings(ast.parse(path.read_text(encoding="utf-8"))))
    assert not bad, "a docstring begins with a noun or a verb: " + "; ".join(bad)


@pytest.mark.parametrize(
    ("source", "owners"),
    [
        ('"""What is wrong."""', ["module"]),
        (
            'class Site:\n    """Of a product."""\n    def run(self):\n        """so it runs."""',
            ["Site", "run"],
        ),
        ('async def load():\n    """``None`` where nothing is."""', ["load"]),
        (
            'def load():\n    """Widths of what is loaded."""\n    # Of a comment\n    text = "Of"',
            [],
        ),
        ("def load():\n    return 1", []),
    ],
)
def test_docstrings_that_begin_badly_are_seen(source: str, owners: list[str]) -> None:
    found = [line.partition(":")[0] for line in badly_opened_docstrings(ast.parse(source))]
    assert found == owners


@pytest.mark.parametrize("path", [*SOURCES, *TESTS], ids=ids)
def test_no_pickle_and_no_evaluated_text(path: Path) -> None:
    assert "pickle" not in {name.split(".")[0] for name, _ in imports(path)}
    calls = {
        node.func.id
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    assert not calls & {"eval", "exec"}

"""The modules of an engine import each other in one direction, and nothing of what lies beside the engine."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from common.phases import Phase

Modules = Mapping[str, tuple[ast.Module, bool]]  # by dotted name: the source, and whether it is a package


def modules_of(engine: Path) -> Modules:
    found = {}
    for file in sorted(engine.rglob("*.py")):
        parts = ("engine", *file.relative_to(engine).with_suffix("").parts)
        package = parts[-1] == "__init__"
        found[".".join(parts[:-1] if package else parts)] = ast.parse(file.read_text(encoding="utf-8")), package
    return found


def import_statements(node: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    """All imports that are run at some time, those within functions too; not those under `if TYPE_CHECKING`."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child
        elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            for other in child.orelse:
                yield from import_statements(ast.Module([other], []))
        else:
            yield from import_statements(child)


def imported(modules: Modules, name: str) -> set[str]:
    """The modules of the engine that one of them names in its imports."""
    tree, package = modules[name]
    found = set()
    for statement in import_statements(tree):
        if isinstance(statement, ast.ImportFrom) and statement.level:
            above = name.split(".")[: len(name.split(".")) - statement.level + package]
            base = ".".join([*above, *([statement.module] if statement.module else [])])
            for alias in statement.names:
                found.add(f"{base}.{alias.name}" if f"{base}.{alias.name}" in modules else base)
    return found & set(modules)


def cycle(imports: Mapping[str, set[str]]) -> list[str]:
    """Modules each of which imports the next, the last being the first; none where there is no such row."""
    done: set[str] = set()

    def walk(name: str, path: list[str]) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return []
        for other in sorted(imports[name]):
            if found := walk(other, [*path, name]):
                return found
        done.add(name)
        return []

    return next((found for name in sorted(imports) if (found := walk(name, []))), [])


def write(folder: Path, **sources: str) -> Modules:
    for name, text in sources.items():
        (folder / f"{name}.py").write_text(text)
    return modules_of(folder)


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("from .b import x", {"engine.b"}),
        ("from . import b, x", {"engine", "engine.b"}),
        ("def f():\n    from . import b", {"engine.b"}),
        ("if TYPE_CHECKING:\n    from . import b\nelse:\n    from .c import x", {"engine.c"}),
        ("import b\nfrom common import c", set()),
    ],
)
def test_imports_are_read(text: str, names: set[str], tmp_path: Path) -> None:
    assert imported(write(tmp_path, __init__="", a=text, b="", c=""), "engine.a") == names


def test_a_cycle_is_found(tmp_path: Path) -> None:
    row = {
        "a": "from .b import x",
        "b": "def f():\n    from . import c",
        "c": "from .a import y",
        "d": "from .a import z",
    }
    modules = write(tmp_path, __init__="", **row)
    assert cycle({name: imported(modules, name) for name in modules}) == [
        "engine.a",
        "engine.b",
        "engine.c",
        "engine.a",
    ]
    modules = write(tmp_path, c="from .other import y")
    assert cycle({name: imported(modules, name) for name in modules}) == []


@pytest.mark.no_exercise
@pytest.mark.newest
def test_no_modules_import_each_other_in_a_circle(phase: Phase) -> None:
    modules = modules_of(phase.folder / "engine")
    found = cycle({name: imported(modules, name) for name in modules})
    assert not found, " -> ".join(found)


@pytest.mark.no_exercise
@pytest.mark.newest
def test_an_engine_imports_nothing_that_lies_beside_it(phase: Phase) -> None:
    """Programs, benches, checks, ladders, training: they import the engine, and later phases may not have them."""
    beside = {"tests"} | {path.stem for path in phase.folder.glob("*.py")}
    beside |= {path.parent.name for path in phase.folder.glob("*/*.py") if path.parent.name != "engine"}
    assert "bench" in beside
    for name, (tree, _) in modules_of(phase.folder / "engine").items():
        for statement in import_statements(tree):
            if isinstance(statement, ast.Import):
                names = [alias.name for alias in statement.names]
            else:
                names = [] if statement.level else [statement.module or ""]
            wrong = [other for other in names if other.partition(".")[0] in beside]
            assert not wrong, f"{name}, line {statement.lineno}: imports {wrong[0]}"

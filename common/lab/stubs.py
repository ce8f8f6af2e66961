"""Stubs: source code whose functions keep signature and docstring, and lose their bodies.

Everything outside of bodies is kept, comments included: imports, constants, data classes, protocols. A private helper
is removed, unless kept code names it: finding helpers is part of the solution.

    python -c "from common.lab.stubs import stub; print(stub({'a.py': 'def f():\\n    return 1\\n'}, {'a.py'})['a.py'])"
"""

from __future__ import annotations

import ast
import json
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

Function = ast.FunctionDef | ast.AsyncFunctionDef
Edit = tuple[int, int, list[str]]  # first and last line, counted from 1, and the replacement

NOT_WRITTEN = re.compile(r"not written yet: (?P<function>\S+, [\w.]+)\(\)")
LINE = 120


@dataclass(frozen=True)
class Stub:
    """A function to write."""

    file: str
    name: str  # with its class: `ModelDrafter.propose`
    purpose: str  # the first line of its docstring, or else its signature

    def __str__(self) -> str:
        return f"{self.file}, {self.name}"


def definitions(node: ast.AST, prefix: str = "") -> Iterator[tuple[str, Function | ast.ClassDef]]:
    """Yield all functions and classes of a module or class with their dotted names, not those inside functions."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, Function):
            yield prefix + child.name, child
        elif isinstance(child, ast.ClassDef):
            yield prefix + child.name, child
            yield from definitions(child, f"{prefix}{child.name}.")
        elif isinstance(child, ast.stmt | ast.ExceptHandler):
            yield from definitions(child, prefix)


def first_line(node: ast.Module | ast.ClassDef | Function) -> str:
    return (ast.get_docstring(node) or "").split("\n")[0]


def function_text(source: str, name: str) -> str | None:
    """Return the lines of one function with its decorators, or None if the source has no such function."""
    found = next((node for n, node in definitions(ast.parse(source)) if n == name), None)
    return "\n".join(source.splitlines()[_begin(found) - 1 : found.end_lineno]) if found else None


def stub(sources: Mapping[str, str], chosen: Collection[str]) -> dict[str, str]:
    """Replace chosen functions of a package (path -> text) by stubs: all of `a.py`, or `a.py, Class.method`.

    Code that runs while the package is imported is kept, and so are `__str__` and its like, which teach nothing.
    """
    trees = {file: ast.parse(text) for file, text in sources.items()}
    running = _runs_at_import(trees.values())
    texts = dict(sources)
    for file, tree in trees.items():
        lines = sources[file].splitlines()
        edits = [
            _without_body(lines, file, name, node)
            for name, node in definitions(tree)
            if isinstance(node, Function)
            and (file in chosen or f"{file}, {name}" in chosen)
            and not _hollow(node)
            and not _plumbing(node.name)
            and (name.split(".")[-2] if node.name == "__init__" and "." in name else node.name) not in running
        ]
        texts[file] = _edited(lines, edits)
    return _without_helpers(texts, chosen)


def stubs_in(file: str, text: str) -> list[Stub]:
    """List the functions of a source that are not written yet, in order."""
    if "not written yet" not in text:
        return []
    tree = ast.parse(text)
    return [
        Stub(file, name, _purpose(node))
        for name, node in definitions(tree)
        if isinstance(node, Function) and isinstance(node.body[-1], ast.Raise) and "not written yet" in ast.dump(node)
    ]


def _begin(node: ast.stmt) -> int:
    decorators: list[ast.expr] = getattr(node, "decorator_list", [])
    return min(node.lineno, *(decorator.lineno for decorator in decorators)) if decorators else node.lineno


def _plumbing(name: str) -> bool:
    return name.startswith("__") and name.endswith("__") and name not in ("__init__", "__call__")


def _hollow(node: Function) -> bool:
    """Return whether a body is only a docstring, `...` or `pass`: a protocol's method, or one that does nothing."""
    return all(
        isinstance(n, ast.Pass) or (isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant)) for n in node.body
    )


def _purpose(node: Function) -> str:
    result = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    return first_line(node) or f"{node.name}({ast.unparse(node.args)}){result}"


def _without_body(lines: list[str], file: str, name: str, node: Function) -> Edit:
    first, column = node.body[0], node.body[0].col_offset
    if ast.get_docstring(node) is not None:
        assert first.end_lineno
        begin, head = first.end_lineno + 1, []
    else:
        begin = _begin(first)
        before = lines[begin - 1].encode()[:column].decode()
        head = [before.rstrip()] if before.strip() else []  # `def f(): return 1`, all on one line
        column = node.col_offset + 4
        while not head and re.fullmatch(r"\s*(#.*)?", lines[begin - 2]):
            begin -= 1
    assert node.end_lineno
    end = node.end_lineno
    while end < len(lines) and re.match(rf" {{{node.col_offset + 1},}}#", lines[end]):  # a comment at the body's end
        end += 1
    purpose = _purpose(node)
    message = json.dumps(f"not written yet: {file}, {name}(): {purpose}", ensure_ascii=False)
    indent = " " * column
    raised = [f"{indent}raise NotImplementedError({message})"]
    if len(raised[0]) > LINE:
        raised = [f"{indent}raise NotImplementedError(", f"{indent}    {message}", f"{indent})"]
    return begin, end, head + raised


def _edited(lines: list[str], edits: list[Edit]) -> str:
    lines = list(lines)
    for begin, end, new in sorted(edits, reverse=True):
        lines[begin - 1 : end] = new
    return "\n".join(lines).rstrip("\n") + "\n" if lines else ""


def _names(node: ast.AST) -> Iterator[str]:
    """Yield every name in the code."""
    for inner in ast.walk(node):
        if isinstance(inner, ast.Name):
            yield inner.id
        elif isinstance(inner, ast.Attribute):
            yield inner.attr
        elif isinstance(inner, ast.alias):
            yield inner.name
        elif isinstance(inner, ast.Constant) and isinstance(inner.value, str):
            yield inner.value  # `__all__`


def _without_helpers(texts: dict[str, str], chosen: Collection[str]) -> dict[str, str]:
    """Remove unused private functions and classes from the files that are chosen whole."""
    whole = set(chosen) & texts.keys()
    if not whole:
        return texts
    trees = {file: ast.parse(text) for file, text in texts.items()}
    mentioned = Counter(name for tree in trees.values() for name in _names(tree))
    result = dict(texts)
    for file in whole:
        lines, edits = texts[file].splitlines(), list[Edit]()
        classes = [node for _, node in definitions(trees[file]) if isinstance(node, ast.ClassDef)]
        needed = {node.body[0] for node in classes if all(isinstance(inner, Function) for inner in node.body)}
        for _, node in definitions(trees[file]):
            private = node.name.startswith("_") and not node.name.endswith("__")
            if not private or node in needed or mentioned[node.name] > Counter(_names(node))[node.name]:
                continue
            begin = _begin(node)
            while begin > 1 and re.fullmatch(r"\s*(#.*)?", lines[begin - 2]):
                begin -= 1
            assert node.end_lineno
            if not edits or begin > edits[-1][1]:  # not inside a removed class
                edits.append((begin, node.end_lineno, []))
        result[file] = _edited(lines, edits)
    return result


def _at_import(body: Iterable[ast.AST]) -> Iterator[ast.AST]:
    """Yield the nodes that are evaluated when these statements run: no function's body."""
    for node in body:
        if isinstance(node, Function | ast.ClassDef):
            yield from (ast.Call(func=decorator, args=[], keywords=[]) for decorator in node.decorator_list)
        if isinstance(node, Function):
            yield from (default for default in (*node.args.defaults, *node.args.kw_defaults) if default)
        elif isinstance(node, ast.ClassDef):
            yield from (*node.bases, *node.keywords)
            yield from _at_import(node.body)
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'":
            continue
        elif isinstance(node, ast.If | ast.For | ast.While | ast.With | ast.Try | ast.ExceptHandler):
            yield from _at_import(ast.iter_child_nodes(node))
        elif not isinstance(node, ast.Import | ast.ImportFrom):
            yield node


def _calls(node: ast.AST, foreign: set[str]) -> Iterator[str]:
    """Yield the names of called functions, unless they come from other packages."""
    for call in (inner for inner in ast.walk(node) if isinstance(inner, ast.Call)):
        root: ast.AST = call.func
        while isinstance(root, ast.Attribute | ast.Call):
            root = root.value if isinstance(root, ast.Attribute) else root.func
        if not (isinstance(root, ast.Name) and root.id in foreign):
            if isinstance(call.func, ast.Name):
                yield call.func.id
            elif isinstance(call.func, ast.Attribute):
                yield call.func.attr


def _runs_at_import(trees: Iterable[ast.Module]) -> set[str]:
    """Return the names of functions and classes that are called, directly or not, while the package is imported."""
    bodies: dict[str, list[tuple[ast.AST, set[str]]]] = {}
    todo: list[tuple[ast.AST, set[str]]] = []
    for tree in trees:
        imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
        foreign = {
            (alias.asname or alias.name).split(".")[0]
            for node in imports
            for alias in node.names
            if isinstance(node, ast.Import) or not node.level
        }
        todo += [(node, foreign) for node in _at_import(tree.body)]
        for name, node in definitions(tree):
            if isinstance(node, Function):
                called_as = name.split(".")[-2] if node.name == "__init__" and "." in name else node.name
                bodies.setdefault(called_as, []).append((node, foreign))
    found: set[str] = set()
    while todo:
        for name in _calls(*todo.pop()):
            if name in bodies and name not in found:
                found.add(name)
                todo += bodies[name]
    return found

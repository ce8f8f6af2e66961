"""Where in a Python file a prompt of a given kind can begin and end, found with `ast` and `tokenize`.

A place gives the line on which a prompt starts and the range in which it must end, so that the prompt shows the kind of
code and leaves the rest of it to come: a docstring is open, a call has its first parenthesis.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

from common.models.corpus import SourceFile

ARGUMENT_CALLS = {"ArgumentParser", "OptionParser", "add_argument", "add_option", "add_option_group", "make_option"}
ARGUMENT_CALLS |= {"getopt", "FancyGetopt", "set_option_table", "parse_args", "parse_command_line", "set_defaults"}
REGEX_CALLS = {"compile", "match", "search", "sub", "findall", "fullmatch", "split"}
REGEX_ASSERTIONS = {"assertRegex", "assertNotRegex", "assertRaisesRegex", "assertWarnsRegex"}
_METACHARACTER = re.compile(r"[\\\[(*+?^$|]")
CONTEXT = 3  # statements before a call
LEAST_TABLE = 6  # entries; a shorter list is not a table
LEAST_IMPORTS = 3  # statements
LEAST_BODY = 4  # lines
DEEPEST = 8  # columns; more deeply nested code makes an odd beginning

FunctionNode = (ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True)
class Place:
    """A possible prompt: `start` is the beginning of a line, the end lies in earliest..latest (character offsets)."""

    kind: str
    file: str
    start: int
    earliest: int
    latest: int


class Source:
    """A parsed file that converts line numbers and (line, byte column) pairs to character offsets."""

    def __init__(self, file: SourceFile) -> None:
        self.path, self.text = file.path, file.text
        self.lines = file.text.split("\n")
        self.starts = [0, *accumulate(len(line) + 1 for line in self.lines)]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the library's tests hold doubtful literals on purpose
            self.nodes = list(ast.walk(ast.parse(file.text)))

    def line_start(self, line: int) -> int:
        return self.starts[line - 1]

    def line_end(self, line: int) -> int:
        """Return the offset just before the line's newline."""
        return self.line_start(line) + len(self.lines[line - 1])

    def offset(self, line: int, column: int) -> int:
        return self.line_start(line) + len(self.lines[line - 1].encode()[:column].decode())

    def end_of(self, node: ast.expr | ast.stmt) -> int:
        return self.offset(node.end_lineno or node.lineno, node.end_col_offset or 0)

    def first_line(self, node: ast.stmt) -> int:
        """Return the line of the statement, or of its first decorator."""
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and node.decorator_list:
            return node.decorator_list[0].lineno
        return node.lineno

    def place(self, kind: str, line: int, earliest: int, latest: int) -> Iterator[Place]:
        if latest >= earliest:
            yield Place(kind, self.path, self.line_start(line), earliest, latest)

    def body_place(self, kind: str, first_line: int, node: ast.stmt) -> Iterator[Place]:
        """Yield the place from `first_line` to within the node's body, if the body is long enough."""
        last = (node.end_lineno or node.lineno) - 1
        if last - node.lineno + 1 >= LEAST_BODY and node.col_offset <= DEEPEST:
            yield from self.place(kind, first_line, self.line_end(node.lineno), self.line_end(last))


def _called(call: ast.Call) -> tuple[str, str]:
    """Return the called name as (owner, name): `re.compile(...)` is ("re", "compile"), `f(...)` is ("", "f")."""
    if isinstance(call.func, ast.Attribute):
        return ast.unparse(call.func.value), call.func.attr
    return "", call.func.id if isinstance(call.func, ast.Name) else ""


def _pattern(call: ast.Call) -> ast.expr | None:
    """Return the regular expression among a call's arguments; for an assertion only if it is more than plain text."""
    owner, name = _called(call)
    if owner == "re" and name in REGEX_CALLS and call.args:
        return call.args[0]
    if name in REGEX_ASSERTIONS:
        for argument in call.args:
            text = argument.value if isinstance(argument, ast.Constant) else None
            if isinstance(text, str) and _METACHARACTER.search(text):
                return argument
    return None


def _calls_of(statement: ast.stmt) -> list[ast.Call]:
    """Return the calls in a simple statement, or in the head of a `with` or an `if`."""
    parts: Sequence[ast.AST] = []
    if isinstance(statement, ast.Expr | ast.Assign | ast.Return):
        parts = [statement]
    elif isinstance(statement, ast.With):
        parts = [item.context_expr for item in statement.items]
    elif isinstance(statement, ast.If):
        parts = [statement.test]
    return [node for part in parts for node in ast.walk(part) if isinstance(node, ast.Call)]


def _definitions(source: Source) -> Iterator[Place]:
    for node in source.nodes:
        if isinstance(node, ast.ClassDef):
            if not re.search("Test|Case", node.name):
                yield from source.body_place("class_body", source.first_line(node), node)
            for index, method in enumerate(node.body):
                if isinstance(method, FunctionNode) and method.name.startswith("test"):
                    opening = node if index == 0 else method  # the first test includes the head of its class
                    yield from source.body_place("unit_test", source.first_line(opening), method)
        elif isinstance(node, FunctionNode) and not node.name.startswith("test"):
            yield from source.body_place("function_body", source.first_line(node), node)
        elif isinstance(node, ast.Try):
            yield from source.body_place("error_handling", node.lineno, node)


def _docstrings(source: Source) -> Iterator[Place]:
    for node in source.nodes:
        if isinstance(node, (ast.Module, ast.ClassDef, *FunctionNode)) and ast.get_docstring(node):
            literal = node.body[0]
            opening = literal.lineno if isinstance(node, ast.Module) else source.first_line(node)
            begin = source.offset(literal.lineno, literal.col_offset)
            yield from source.place("docstring", opening, begin + 10, source.end_of(literal) - 30)


def _statements(source: Source) -> Iterator[Place]:
    """Yield imports, argument declarations, regular expressions and tables, from each list of statements."""
    for node in source.nodes:
        if isinstance(node, ast.expr):  # the body of a lambda is not a list of statements
            continue
        for body in (getattr(node, name, []) for name in ("body", "orelse", "finalbody")):
            yield from _imports(source, body)
            for index, statement in enumerate(body):
                yield from _calls(source, node, body, index)
                yield from _tables(source, statement)


def _imports(source: Source, body: list[ast.stmt]) -> Iterator[Place]:
    is_import = [isinstance(statement, ast.Import | ast.ImportFrom) for statement in body]
    for index, first in enumerate(body):
        if is_import[index] and not (index and is_import[index - 1]):
            last = index
            while last + 1 < len(body) and is_import[last + 1]:
                last += 1
            if last - index + 1 >= LEAST_IMPORTS:
                end = source.end_of(body[last])
                yield from source.place("imports", first.lineno, source.line_end(first.lineno), end - 4)


def _calls(source: Source, owner: ast.AST, body: list[ast.stmt], index: int) -> Iterator[Place]:
    """Yield a statement that declares arguments or uses a regular expression, with up to three before it."""
    if index <= CONTEXT and isinstance(owner, FunctionNode):
        opening = source.first_line(owner)
    else:
        opening = source.first_line(body[max(0, index - CONTEXT)])
    calls = _calls_of(body[index])
    declaration = next((call for call in calls if _called(call)[1] in ARGUMENT_CALLS), None)
    if declaration:
        latest = source.end_of(body[min(len(body) - 1, index + CONTEXT)])
        yield from source.place("argument_parsing", opening, source.end_of(declaration.func) + 1, latest)
    for call in calls:
        if (pattern := _pattern(call)) is not None:
            begin, latest = source.end_of(call.func) + 1, source.end_of(pattern) - 3
            yield from source.place("regular_expression", opening, begin, latest)


def _tables(source: Source, statement: ast.stmt) -> Iterator[Place]:
    value = statement.value if isinstance(statement, ast.Assign) else None
    entries = value.keys if isinstance(value, ast.Dict) else getattr(value, "elts", [])
    if value is not None and len(entries) >= LEAST_TABLE and value.end_lineno != value.lineno:
        begin = source.offset(value.lineno, value.col_offset)
        yield from source.place("data_table", statement.lineno, begin + 1, source.end_of(value) - 30)


def _comments(source: Source) -> Iterator[Place]:
    """Yield blocks of at least two lines with nothing but a comment."""
    tokens = tokenize.generate_tokens(io.StringIO(source.text).readline)
    alone = [t.start[0] for t in tokens if t.type == tokenize.COMMENT and t.line.lstrip().startswith("#")]
    blocks: list[list[int]] = []
    for line in alone:
        if blocks and blocks[-1][-1] == line - 1:
            blocks[-1].append(line)
        else:
            blocks.append([line])
    for block in blocks:
        first, last = block[0], block[-1]
        if last > first and "#!" not in source.lines[first - 1]:
            yield from source.place("comment", first, source.line_start(first) + 12, source.line_end(last) - 10)


def find_places(file: SourceFile) -> list[Place]:
    """Return all places of one file, every kind; none for a file that this Python cannot parse."""
    try:
        source = Source(file)
        return [place for find in (_definitions, _docstrings, _statements, _comments) for place in find(source)]
    except (SyntaxError, tokenize.TokenError):
        return []

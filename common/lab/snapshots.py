"""The contents of a phase's folder, the differences of two phases, and the list of them in a phase's README.

The list is the first indented block of the section `## What changed since phase N`, one file a line:

    + engine/verify.py   the acceptance rule alone
    ~ engine/llm.py  loads the draft, chooses the loop
        LLM.run, LLM.header
    - engine/old.py      why it went

A line is a sign (`+` added, `~` changed, `-` removed), the path below the phase's folder, two spaces, words. A folder
at the top that is removed with all its content has one line, `- name/  words`. Below a
changed Python file, indented deeper and on as many lines as needed, are the definitions that were added, changed or
removed, as `changed_definitions` gives them. A line `part NAME: words` starts a part. A phase's OWN files are not
listed: every phase writes its README, notebook, bench and results anew.

    python -c "from common.lab.snapshots import *; from common.phases import *; print(read_list(phases()[1]))"
"""

from __future__ import annotations

import ast
import copy
import os
import re
import subprocess
import textwrap
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, cast

from common.errors import UserError
from common.phases import Phase

Sign = Literal["+", "~", "-"]
SIGNS: tuple[Sign, ...] = ("+", "~", "-")  # in reading order
BENCH = ("bench.py", "benchmarks")
OWN = ("README.md", "lesson.ipynb", "results", *BENCH)  # names at the top of a phase's folder

HEADING = re.compile(r"## What changed since phase (\d+)\s*")
PART = re.compile(r" {4}part (?P<name>[\w-]+)(: *(?P<words>.*))?")
CHANGE = re.compile(r" {4}(?P<sign>[-+~]) (?P<path>\S+)(  +(?P<words>.*))?")
NAMES = re.compile(r" {5,}[\w.]+(, *[\w.]+)*,?")
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


@dataclass(frozen=True)
class Change:
    """One file of the list."""

    sign: Sign
    path: str  # below the phase's folder, with /
    words: str = ""
    names: tuple[str, ...] = ()  # the differing definitions of a changed Python file
    part: str = ""


@dataclass(frozen=True)
class ChangeList:
    """The list of a README, and its position in the text."""

    since: int | None = None  # the phase in its heading; None without a heading
    changes: tuple[Change, ...] = ()
    parts: Mapping[str, str] = field(default_factory=dict)  # name -> words
    start: int = 0  # the block's lines are text.splitlines()[start:end]
    end: int = 0


def files(folder: Path) -> list[str]:
    """List the paths of a folder, with /, sorted: files that git tracks or would add, so no ignored ones.

    Outside of git: everything but hidden folders, caches and build products.
    """
    # A git hook sets the repository by environment variables; here the folder decides.
    hooks = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_PREFIX")
    plain = {name: value for name, value in os.environ.items() if name not in hooks}
    command = ["git", "-C", str(folder), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(command, capture_output=True, env=plain, check=True).stdout.decode().split("\0")
    except (OSError, subprocess.CalledProcessError):
        listed = []
    found = {path for path in listed if path and (folder / path).is_file()}
    return sorted(found or _on_disk(folder))


def _on_disk(folder: Path) -> Iterator[str]:
    for top, folders, names in os.walk(folder):
        products = {"__pycache__", "build", "dist"}
        folders[:] = [f for f in folders if f not in products and not f.startswith(".") and not f.endswith(".egg-info")]
        yield from ((Path(top) / name).relative_to(folder).as_posix() for name in names)


def difference(old: Path, new: Path, without: tuple[str, ...] = OWN) -> dict[str, Sign]:
    """Return the real differences of two folders: path -> sign, sorted by path, without paths at or under `without`."""
    before, after = ({p for p in files(folder) if p.split("/")[0] not in without} for folder in (old, new))
    signs: dict[str, Sign] = {}
    for path in sorted(before | after):
        if path not in before:
            signs[path] = "+"
        elif path not in after:
            signs[path] = "-"
        elif (old / path).read_bytes() != (new / path).read_bytes():
            signs[path] = "~"
    return signs


def folded(signs: Mapping[str, Sign], new: Path) -> dict[str, Sign]:
    """The same difference with one entry, `name/`, for a folder at the top of which the new phase has nothing left."""
    left = {path.split("/")[0] for path in files(new)}
    found: dict[str, Sign] = {}
    for path, sign in signs.items():
        top, slash, _ = path.partition("/")
        found[path if top in left or not slash else f"{top}/"] = sign
    return found


def definitions(source: str) -> dict[str, str]:
    """Return dotted name -> syntax tree without positions, for a module's functions, classes, methods and variables.

    A class's entry holds its contents except methods, which have their own entries. The module's docstring, imports
    and `__all__` are left out: they follow from the rest. Statements without a name (`if`, `for`, ...) form one entry
    `module`. Raises SyntaxError.
    """
    found: dict[str, str] = defaultdict(str)
    module = ast.parse(source)
    _collect(module.body[ast.get_docstring(module) is not None :], "", found)
    found.pop("__all__", None)
    return dict(found)


def _collect(body: Sequence[ast.stmt], prefix: str, found: dict[str, str]) -> None:
    for node in body:
        if isinstance(node, ast.ClassDef):
            inner = [child for child in node.body if isinstance(child, DEFINITIONS)]
            shell = copy.copy(node)
            shell.body = [child for child in node.body if child not in inner]
            found[prefix + node.name] += ast.dump(shell)
            _collect(inner, f"{prefix}{node.name}.", found)
        elif isinstance(node, DEFINITIONS):
            found[prefix + node.name] += ast.dump(node)
        elif isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for name in (n.id for target in targets for n in ast.walk(target) if isinstance(n, ast.Name)):
                found[name] += ast.dump(node)
        elif not isinstance(node, ast.Import | ast.ImportFrom):
            found["module"] += ast.dump(node)


def changed_definitions(old: Path, new: Path) -> tuple[str, ...]:
    """Return the definitions in which two Python files differ, in the order of the new one, removed ones last.

    A class that only one of them has is named without its methods. Raises UserError for a file that is not Python.
    """
    trees = []
    for path in (old, new):
        try:
            trees.append(definitions(path.read_text(encoding="utf-8")))
        except (SyntaxError, ValueError) as error:
            where = f", line {error.lineno}" if isinstance(error, SyntaxError) else ""
            raise UserError(f"{path}{where}: not valid Python ({getattr(error, 'msg', error)}); repair it") from None
    before, after = trees
    differing = [name for name in {**after, **before} if before.get(name) != after.get(name)]
    one_sided = {name for name in differing if name not in before or name not in after}
    return tuple(name for name in differing if name.rpartition(".")[0] not in one_sided)


def parse_list(text: str, where: str = "README.md") -> ChangeList:
    """Parse the list in a README's text. Raises UserError, naming the line, for an invalid one."""
    lines = text.splitlines()
    headings = ((i, match) for i, line in enumerate(lines) if (match := HEADING.fullmatch(line)))
    heading, match = next(headings, (None, None))
    if heading is None or match is None:
        return ChangeList()
    section_end = next((i for i in range(heading + 1, len(lines)) if lines[i].startswith("#")), len(lines))
    start = next((i for i in range(heading + 1, section_end) if lines[i].startswith("    ")), None)
    if start is None:
        return ChangeList(int(match[1]), start=heading + 1, end=heading + 1)
    end = start
    for i in range(start, section_end):
        if lines[i].startswith("    "):
            end = i + 1
        elif lines[i].strip():
            break
    changes, parts = _parse_block(lines[start:end], f"{where}, line", start + 1)
    return ChangeList(int(match[1]), tuple(changes), parts, start, end)


def _parse_block(block: list[str], where: str, first: int) -> tuple[list[Change], dict[str, str]]:
    changes: list[Change] = []
    parts: dict[str, str] = {}
    part = ""
    for number, line in enumerate(block, first):
        if not line.strip():
            continue
        if match := PART.fullmatch(line):
            part = match["name"]
            parts[part] = match["words"] or ""
        elif match := CHANGE.fullmatch(line):
            if any(change.path == match["path"] for change in changes):
                raise UserError(f"{where} {number}: {match['path']} is listed twice; leave one line")
            changes.append(Change(cast(Sign, match["sign"]), match["path"], match["words"] or "", (), part))
        elif NAMES.fullmatch(line) and changes and changes[-1].sign == "~":
            names = tuple(name for name in re.split(r"[, ]+", line) if name)
            changes[-1] = replace(changes[-1], names=changes[-1].names + names)
        else:
            raise UserError(
                f"{where} {number}: {line.strip()!r} is no line of the list; expected `+ PATH  WORDS` (also ~ and -), "
                "names of definitions under a ~ line, indented deeper, and `part NAME: WORDS`"
            )
    return changes, parts


def format_list(changes: list[Change], parts: Mapping[str, str]) -> list[str]:
    """Format the lines of a list, each part in its own columns; parsing and formatting again changes nothing."""
    widths: dict[str, int] = {}
    for change in changes:
        widths[change.part] = max(widths.get(change.part, 0), len(change.path))
    lines: list[str] = []
    part = ""
    for change in changes:
        if change.part != part:
            part = change.part
            words = f": {parts[part]}" if parts.get(part) else ""
            lines += [*([""] if lines else []), f"    part {part}{words}"]
        lines.append(f"    {change.sign} {change.path:{widths[part]}}  {change.words}".rstrip())
        lines += textwrap.wrap(", ".join(change.names), 120, initial_indent=" " * 8, subsequent_indent=" " * 8)
    return lines


def read_list(phase: Phase) -> ChangeList:
    """Read the list of a phase's README. Raises UserError for another form than the module describes."""
    readme = phase.folder / "README.md"
    if not readme.is_file():
        raise UserError(f"{phase.folder.name}/README.md is missing; every phase has one")
    return parse_list(readme.read_text(encoding="utf-8"), f"{phase.folder.name}/README.md")


def find_phase(found: list[Phase], number: int) -> Phase:
    """Return the phase of this number. Raises UserError if there is none."""
    for phase in found:
        if phase.number == number:
            return phase
    if not found:
        raise UserError("there are no phases here; run lab in a checkout of the repository")
    raise UserError(f"there is no phase {number}; the phases are {', '.join(str(p.number) for p in found)}")

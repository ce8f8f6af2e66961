"""`lab drift`: check that neighbouring phases differ in what the README lists, and in nothing else.

Copies drift apart: a fix reaches one phase only, or a file is edited by mistake. So the list in a README must equal the
real difference from the phase before, file by file, and in Python files definition by definition (compared as syntax
trees: comments and layout may differ). `--fix` makes the list from the difference. Besides, no text file may contain
what makes differences unreadable: notebook outputs, CRLF, trailing space.

    lab drift
    lab drift --fix
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from common.errors import UserError
from common.lab.arguments import Parser
from common.lab.snapshots import (
    HEADING,
    SIGNS,
    Change,
    ChangeList,
    changed_definitions,
    difference,
    files,
    folded,
    format_list,
    read_list,
)
from common.phases import ROOT, Phase, phases

UNDO = (
    "undo the change; or, if it is a fix, make it in the first phase that has the file, and `lab port` carries "
    "it to the later ones; or, if it belongs to the lesson, `lab drift --fix` lists it in the README"
)
RELIST = "`lab drift --fix` removes it from the list"
BY_HAND = "repair it by hand, then run `lab drift` again"
CLEAR = "clear all outputs in the notebook and save it"
STRIP = "strip it; editors do so on saving, with line ends set to LF"


@dataclass(frozen=True)
class Finding:
    """A fault, beginning with the file, and its remedy."""

    what: str
    remedy: str


def _first_difference(old: Path, new: Path) -> int:
    """Return the number of the first line in which two files differ."""
    lines = itertools.zip_longest(*(path.read_bytes().split(b"\n") for path in (old, new)))
    return next(number for number, (before, after) in enumerate(lines, 1) if before != after)


def _differing(old: Phase, new: Phase, path: str) -> tuple[str, ...]:
    """Return the definitions in which a file of both phases differs; none if it is not Python."""
    return changed_definitions(old.folder / path, new.folder / path) if path.endswith(".py") else ()


def compare_pair(old: Phase, new: Phase) -> Iterator[Finding]:
    """Yield every difference between the later phase's list and the real difference."""
    readme = f"{new.folder.name}/README.md"
    try:
        listing = read_list(new)
    except UserError as error:
        yield Finding(str(error), BY_HAND)
        return
    if listing.since != old.number:
        heading = f"`## What changed since phase {old.number}`"
        yield Finding(f"{readme}: the section {heading} is missing", "`lab drift --fix` writes it")
    listed = {change.path: change for change in listing.changes}
    real = folded(difference(old.folder, new.folder), new.folder)
    for path in sorted(real.keys() | listed):
        file, sign, entry = f"{new.folder.name}/{path}", real.get(path), listed.get(path)
        if sign is None:
            yield Finding(
                f"{readme}: lists {path}, in which phases {old.number} and {new.number} do not differ", RELIST
            )
        elif entry is None:
            what = {"+": f"is not in phase {old.number}", "-": f"is missing; phase {old.number} has it"}.get(sign)
            if not what:
                line = _first_difference(old.folder / path, new.folder / path)
                what = f"differs from phase {old.number}'s from line {line} on"
            yield Finding(f"{file}: {what}, and {readme} does not list it", UNDO)
        elif entry.sign != sign:
            yield Finding(
                f"{readme}: lists {path} with `{entry.sign}`, and `{sign}` is right", "`lab drift --fix` sets it"
            )
        elif sign == "~":
            yield from _compare_names(old, new, entry)


def _compare_names(old: Phase, new: Phase, entry: Change) -> Iterator[Finding]:
    try:
        differing = _differing(old, new, entry.path)
    except UserError as error:
        yield Finding(str(error), BY_HAND)
        return
    readme = f"{new.folder.name}/README.md"
    for name in differing:
        if name not in entry.names:
            what = f"{name} differs from phase {old.number}'s, and {readme} does not name it"
            yield Finding(f"{new.folder.name}/{entry.path}: {what}", UNDO)
    for name in entry.names:
        if name not in differing:
            yield Finding(f"{readme}: names {name} under {entry.path}, in which it does not differ", RELIST)


def check_text(root: Path, path: str) -> Iterator[Finding]:
    """Yield the forbidden contents of a text file of the repository."""
    content = (root / path).read_bytes()
    if b"\0" in content:
        return
    if path.endswith(".ipynb"):
        try:
            cells = json.loads(content)["cells"]
        except (ValueError, KeyError):
            yield Finding(f"{path}: is no notebook (not valid JSON, or without cells)", BY_HAND)
            return
        for number, cell in enumerate(cells, 1):
            if cell.get("outputs") or cell.get("execution_count"):
                yield Finding(f"{path}: cell {number} holds an output or an execution count", CLEAR)
                break
    for pattern, what in ((rb"\r\n", "with CRLF"), (rb"[ \t]+$", "with a space or tab")):
        if match := re.search(pattern, content, re.MULTILINE):
            line = content.count(b"\n", 0, match.start()) + 1
            yield Finding(f"{path}: line {line} ends {what}", STRIP)


def _first_words(file: Path) -> str:
    """Return the first words of a new entry: the first line of a Python file's docstring."""
    text = file.read_text(encoding="utf-8") if file.suffix == ".py" and file.is_file() else ""
    match = re.match(r'[rR]?"""(.+?)\.?("""|\n)', text)
    return match[1] if match else "TODO"


def renewed(listing: ChangeList, old: Phase, new: Phase) -> list[Change]:
    """Return the corrected list: correct lines keep their position and words; a new one follows those of its sign."""
    real = folded(difference(old.folder, new.folder), new.folder)
    changes = [replace(entry, sign=real[entry.path]) for entry in listing.changes if entry.path in real]
    kept = {entry.path for entry in changes}
    for path, sign in real.items():
        if path not in kept:
            before = [i for i, entry in enumerate(changes) if SIGNS.index(entry.sign) <= SIGNS.index(sign)]
            position = before[-1] + 1 if before else 0
            part = changes[max(position - 1, 0)].part if changes else ""
            changes.insert(position, Change(sign, path, _first_words(new.folder / path), part=part))
    return [replace(c, names=_differing(old, new, c.path) if c.sign == "~" else ()) for c in changes]


def fix(old: Phase, new: Phase) -> bool:
    """Rewrite the list in the later phase's README from the real difference. True if that changed the file.

    Raises UserError if the present list, or a Python file, cannot be read.
    """
    readme = new.folder / "README.md"
    listing = read_list(new)
    text = readme.read_text(encoding="utf-8")
    if listing.since is None:
        text += f"\n## What changed since phase {old.number}\n"
        listing = ChangeList(start=len(text.splitlines()), end=len(text.splitlines()))
    lines = text.splitlines()
    block = format_list(renewed(listing, old, new), listing.parts)
    if block and listing.start == listing.end:  # there is no list yet; insert it below the heading
        block = ["", *block]
    lines[listing.start : listing.end] = block
    heading = f"## What changed since phase {old.number}"
    renewed_text = "\n".join(heading if HEADING.fullmatch(line) else line for line in lines) + "\n"
    if renewed_text == readme.read_text(encoding="utf-8"):
        return False
    readme.write_text(renewed_text, encoding="utf-8", newline="\n")
    return True


def run(arguments: list[str], root: Path = ROOT) -> int:
    parser = Parser("lab drift", "Check that neighbouring phases differ in what the READMEs list, and in nothing else.")
    parser.add_argument("--fix", action="store_true", help="rewrite the READMEs' lists from the real differences")
    options = parser.parse_args(arguments)
    found = phases(root)
    if not found:
        raise UserError("there are no phases here; run lab in a checkout of the repository")

    pairs = list(itertools.pairwise(found))
    for old, new in pairs if options.fix else []:
        if fix(old, new):
            print(f"rewrote the list in {new.folder.name}/README.md; check the words of its new lines")
    paths = files(root)
    findings = [finding for old, new in pairs for finding in compare_pair(old, new)]
    findings += [finding for path in paths for finding in check_text(root, path)]
    for remedy in dict.fromkeys(finding.remedy for finding in findings):
        for finding in findings:
            if finding.remedy == remedy:
                print(finding.what)
        print(f"  what to do: {remedy}\n")
    if findings:
        return 1
    print(f"lab drift: {len(found)} phases differ as their READMEs say; {len(paths)} files are clean")
    return 0

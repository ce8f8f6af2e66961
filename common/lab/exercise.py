"""The exercise of a phase: the functions to write, their order, and the given files.

Everything is derived from the sources. The files that a phase adds lose the bodies of their functions (stubs.py). Files
that it changes are given whole, because the changes are mostly command-line plumbing. The phase's README may give hints
on functions, in a section `## Exercise` or in one of every chapter (`### Exercise`), one list item each:

    - engine/verify.py, verify (20 min): which token is the first rejected one?
    - engine/record.py: a hint for a whole file

The functions with a time are the core path: by default they alone are empty, and everything else is given. With
`everything` all additions are empty; so they are where no function has a time. The order of the hints is the order of
writing. A hint for a function of a changed file makes that function part of the exercise, so phase 1, which adds no
files, can have one too. In a phase whose list of changes has parts, an item `- part cache: words` limits what
`everything` means to that part, and `part` limits the core path to one part.

    python -c "from common.lab.exercise import *; from common.phases import phases; print(exercise(phases(), 2).stubs)"
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from common.errors import UserError
from common.lab.snapshots import BENCH, OWN, difference, files, find_phase, read_list
from common.lab.stubs import Stub, stub, stubs_in
from common.phases import Phase

HINT = re.compile(r"^- ([a-z]+/[^\s,:]+\.py(?:, [\w.]+)?)(?: \((\d+) min\))?: (.+(?:\n {2,}\S.*)*)", re.MULTILINE)
PART = re.compile(r"^- part ([\w-]+): ", re.MULTILINE)
LEFT_OUT = tuple(name for name in OWN if name not in BENCH)  # one copy, the shipped one, is enough
COMPILED = {".c", ".cc", ".cpp", ".cu", ".cuh", ".h", ".hpp", ".inl", ".metal", ".mm"}


@dataclass(frozen=True)
class Exercise:
    """The contents that `lab start` writes and `lab check` coaches."""

    phase: Phase
    sources: dict[str, str]  # the Python files of `engine` and of what lies beside it, with stubs
    stubs: list[Stub]  # in the order in which to write them
    words: dict[str, str]  # the README's words on each file
    changed: list[str]  # files that the phase changes, given whole or nearly so
    absent: list[str]  # sources in other languages that the phase adds, to be written
    off: list[str]  # likewise of other parts: left out, because they would compute what is to be written
    hints: dict[str, str]  # `engine/a.py, f` or `engine/a.py` -> words
    minutes: dict[str, int]  # of the core path: `engine/a.py, f` or `engine/a.py, C` -> an estimate

    def hint(self, stub: Stub) -> str | None:
        key = _matching(self.hints, stub)
        return self.hints[key] if key else None

    def time(self, stub: Stub) -> int | None:
        """Return how many minutes a function of the core path may take."""
        key = _matching(self.minutes, stub)
        return self.minutes[key] if key else None

    @cached_property
    def shipped(self) -> dict[str, str]:
        """Return the solution: the phase's own sources."""
        return {file: (self.phase.folder / file).read_text(encoding="utf-8") for file in self.sources}


def _exercises(readme: str) -> str:
    """Return the sections `Exercise` of a README: one for all of it, or one in every chapter."""
    return "\n".join(re.findall(r"^##+ Exercise\n(.*?)(?=^##|\Z)", readme, re.MULTILINE | re.DOTALL))


def parse_hints(readme: str) -> dict[str, str]:
    """Parse the hints of a README's sections `Exercise`."""
    return {key: " ".join(words.split()) for key, _, words in HINT.findall(_exercises(readme))}


def parse_minutes(readme: str) -> dict[str, int]:
    """Parse the core path of a README's sections `Exercise`: its functions, and the minutes that each may take."""
    return {key: int(minutes) for key, minutes, _ in HINT.findall(_exercises(readme)) if minutes}


def parse_parts(readme: str) -> set[str]:
    """Parse the parts that a README's sections `Exercise` name; none if everything is the exercise."""
    return set(PART.findall(_exercises(readme)))


def _matching(hints: Collection[str], stub: Stub) -> str | None:
    """Return the hint for a function, or else for its class, or else for its file."""
    keys = (str(stub), str(stub).rpartition(".")[0], stub.file)
    return next((key for key in keys if key in hints), None)


def exercise(found: list[Phase], number: int, everything: bool = False, part: str | None = None) -> Exercise:
    """Return the exercise of one of the found phases; it may have no stubs. UserError for an unknown phase or part."""
    phase = find_phase(found, number)
    at = found.index(phase)
    changes = read_list(phase).changes
    listed = {change.path: change.words for change in changes}
    readme = (phase.folder / "README.md").read_text(encoding="utf-8")
    hints, parts = parse_hints(readme), parse_parts(readme)
    if unknown := parts - {change.part for change in changes}:
        raise UserError(f"{phase.folder.name}/README.md: the exercise is of no part {', '.join(sorted(unknown))}")
    minutes = {} if everything else parse_minutes(readme)
    if part is not None:
        of = {change.path: change.part for change in changes}
        minutes = {key: time for key, time in minutes.items() if of.get(key.partition(",")[0]) == part}
        if not minutes:
            has = sorted({of[file] for key in parse_minutes(readme) if (file := key.partition(",")[0]) in of} - {""})
            raise UserError(
                f"phase {number} has no exercise of a part {part!r}; parts with one: {', '.join(has) or '-'}"
            )
    given = {change.path for change in changes if parts and change.part not in parts}
    paths = [path for path in files(phase.folder) if path.split("/")[0] not in LEFT_OUT]
    signs = difference(found[at - 1].folder, phase.folder) if at else {path: "~" for path in paths}
    sources = {
        path: (phase.folder / path).read_text(encoding="utf-8")
        for path in paths
        if "/" in path and path.endswith(".py") and path.split("/")[0] not in BENCH
    }
    added = {path for path in sources if signs.get(path) == "+" and path not in given}
    wanted = {key: hints[key] for key in minutes} or hints
    hinted = {function for path in sources for function in _functions(path, sources[path], wanted)}
    sources = stub(sources, hinted if minutes else added | hinted)
    compiled = [path for path in paths if signs.get(path) == "+" and Path(path).suffix in COMPILED]
    order, ranks = list(hints), list(listed)

    def writing_order(stub: Stub) -> tuple[int, int]:
        key = _matching(hints, stub)
        rank = ranks.index(stub.file) if stub.file in listed else len(ranks)
        return order.index(key) if key else len(order), rank

    return Exercise(
        phase=phase,
        sources=sources,
        stubs=sorted((s for path, text in sources.items() for s in stubs_in(path, text)), key=writing_order),
        words=listed,
        changed=[path for path in paths if signs.get(path) == "~"] if at else [],
        absent=[path for path in compiled if path not in given and not minutes],
        off=[path for path in compiled if path in given or minutes],
        hints=hints,
        minutes=minutes,
    )


def _functions(path: str, text: str, hints: dict[str, str]) -> list[str]:
    """List the functions of a file that the hints name, directly or by their class."""
    if not any(key.startswith(f"{path}, ") for key in hints):
        return []
    everything = stubs_in(path, stub({path: text}, {path})[path])
    return [str(s) for s in everything if (_matching(hints, s) or path) != path]


def exercise_files(work: Exercise) -> dict[str, bytes]:
    """Return everything in the folder but its guide: path -> content."""
    shipped = work.phase.folder
    without = {*work.absent, *work.off}
    paths = [p for p in files(shipped) if p.split("/")[0] not in LEFT_OUT and p not in without]
    return {p: work.sources[p].encode() if p in work.sources else (shipped / p).read_bytes() for p in paths}

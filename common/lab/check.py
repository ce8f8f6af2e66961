"""`lab check`: run a phase's own tests on a folder in which somebody writes that phase, and help with failures.

The report begins and ends with what to do next: the function to write, or the first failure with the expected and the
actual value. Between them it counts the tests of every function; `--verbose` lists all tests. The tests of every
phase run too, so regressions show. Slow tests, those that need a GPU, and those marked `no_exercise` are left out, but
for those about a function to write.

    lab check 2 my-phase-2
    lab check 2 my-phase-2 --hint
    lab check 2 my-phase-2 --diff    once everything passes: all functions beside the shipped ones
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from common.errors import UserError
from common.lab.arguments import Parser
from common.lab.coaching import Coach
from common.lab.exercise import Exercise, exercise
from common.lab.stubs import NOT_WRITTEN, Stub
from common.phases import EXERCISE_FILE, ROOT, phase_of, phases
from common.terminal import progress

TIME_LIMIT = 60.0  # CPU seconds for one test; a longer one is taken for endless
STYLES = {"passes": "green", "fails": "red", "not written yet": "yellow", "not run": "dim", "skipped": "dim"}
WIDTH = max(map(len, STYLES))
ROWS, LINES = 12, 5  # functions, and lines of a failure's message, in the short report


@dataclass(frozen=True)
class Result:
    """The result of one test."""

    test: str  # pytest's name
    title: str  # its name in words
    words: str  # the first line of its docstring
    group: str  # its subject: a function, or the subject of its file
    own: bool  # a test of this phase, not of every phase
    outcome: str
    about: str | None = None
    message: str = ""
    expected: str | None = None
    got: str | None = None
    where: tuple[str, ...] = ()  # functions of the engine that were running, the innermost last, with line numbers

    def stub(self, work: Exercise) -> Stub | None:
        """Return the function to look at: the unwritten one, the test's subject, or the one that raised the error."""
        stubs = {str(stub): stub for stub in work.stubs}
        unwritten = NOT_WRITTEN.match(self.message)
        named = [unwritten["function"] if unwritten else None, self.about]
        named += [frame.rpartition(", line ")[0] for frame in reversed(self.where)]
        return next((stubs[name] for name in named if name in stubs), None)


def run_tests(work: Exercise, folder: Path, root: Path, extra: list[str]) -> list[Result]:
    """Run the phase's tests on the folder, in a separate process. UserError if they cannot be run."""
    own = f"tests/{work.phase.package}"
    tests = [path for path in (own, "tests/every_phase") if (root / path).is_dir()]
    marks = "not slow and not gpu and (about or not no_exercise)"
    options = ["-m", marks, "-p", "no:cacheprovider", "--continue-on-collection-errors", *extra]
    order = [str(stub) for stub in work.stubs]
    request = {"phase": work.phase.number, "folder": str(folder), "order": order, "limit": TIME_LIMIT}
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    environment["PYTHONDONTWRITEBYTECODE"] = "1"  # bytecode would hide a change within the same second
    environment["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # the tests need none but hypothesis; others take time to load
    environment["OMP_NUM_THREADS"] = "1"  # enough for models this small, and much faster on shared cores
    with tempfile.TemporaryFile("w+") as stdin, tempfile.TemporaryFile("w+") as errors:
        json.dump({**request, "pytest": [*tests, *options]}, stdin)
        stdin.seek(0)
        with subprocess.Popen(
            [sys.executable, "-m", "common.lab.check_plugin"],
            cwd=root,
            env=environment,
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        ) as process:
            assert process.stdout
            results = list(_read(map(json.loads, process.stdout), work, folder))
        if process.returncode:
            errors.seek(0)
            last = (errors.read().strip().splitlines() or [f"status {process.returncode}"])[-1]
            raise UserError(f"the tests of {folder} stopped early: {last}")
    return results


def _read(lines: Iterator[dict[str, Any]], work: Exercise, folder: Path) -> Iterator[Result]:
    with ExitStack() as stack:
        step = None
        for line in lines:
            if "total" in line:
                if line["total"]:
                    step = stack.enter_context(progress(f"phase {work.phase.number}", line["total"]))
            elif "broken" in line:
                if line["broken"] == "engine":
                    raise UserError(f"{folder / 'engine'} cannot be imported: {line['message']}")
                file, message = line["broken"], line["message"]
                yield Result(file, "the file can be loaded", "", file, True, "fails", None, message)
            elif "outside" in line:
                if line["outside"]:
                    raise UserError(f"more than {folder} was tested, these came from elsewhere: {line['outside']}")
            else:
                if step:
                    step(line["title"])
                yield Result(**{**line, "where": tuple(line.get("where", ()))})


def summary(results: list[Result], work: Exercise, console: Console) -> None:
    """Print a line for each function of the exercise that has tests: how many of those about it pass."""
    rows = []
    for stub in work.stubs:
        outcomes = [result.outcome for result in results if result.about == str(stub) and result.outcome != "skipped"]
        if outcomes:
            good = outcomes.count("passes")
            rows.append((good == len(outcomes), f"{stub.file}, {stub.name}", f"{good} of {len(outcomes)} tests"))
    todo = [row for row in rows if not row[0]]
    shown = rows if len(rows) <= ROWS else todo[:ROWS]
    for done, name, count in shown:
        mark = ("  done  ", "green") if done else ("  to do ", "yellow")
        console.print(Text.assemble(mark, name.ljust(max(len(row[1]) for row in shown)), f"  {count}"))
    if len(rows) > len(shown):
        left = f"{len(todo) - len(shown)} more to do, " if len(todo) > len(shown) else ""
        console.print(Text(f"  and {left}{len(rows) - len(todo)} done (--verbose lists all tests)", "dim"))


def report(results: list[Result], work: Exercise, console: Console) -> None:
    """Print every test function with its number of passing cases, grouped by subject."""
    for (own, group), members in groupby(results, key=lambda r: (r.own, r.group)):
        cases = list(members)
        whole = all(case.outcome == "passes" for case in cases)
        console.print(Text(f"\n{group}" if own else f"\ncommon to all phases: {group}", "bold"))
        if whole and not own:
            console.print(Text.assemble("  ", ("passes".ljust(WIDTH), "green"), f"  all {len(cases)}"))
            continue
        for title, same in groupby(cases, key=lambda case: case.title):
            outcomes = [case.outcome for case in same]
            worst = next(o for o in ("fails", "not written yet", "not run", "passes", "skipped") if o in outcomes)
            good = outcomes.count("passes")
            count = f" ({good} of {len(outcomes)} cases pass)" if len(outcomes) > 1 and good < len(outcomes) else ""
            console.print(Text.assemble("  ", (worst.ljust(WIDTH), STYLES[worst]), f"  {title}{count}"))


def explain(result: Result, stub: Stub | None, console: Console, lines: int = 12) -> None:
    """Print the first failure: the function to write, or the expected and the actual value, in so many lines."""
    if result.outcome == "not written yet":
        console.print(Text.assemble(("Write next: ", "bold"), result.message.removeprefix("not written yet: ")))
        console.print(Text(f"  test      {result.test}", "dim"))
        return
    console.print(Text.assemble(("First wrong: ", "bold"), f"{result.title}{f', in {stub}()' if stub else ''}"))
    for line in [result.words, *result.message.splitlines()[:lines]]:
        if line.strip():
            console.print(Text(f"  {line.strip()}"))
    if result.expected is not None:
        console.print(Text.assemble(("  expected  ", "green"), result.expected))
        console.print(Text.assemble(("  got       ", "red"), result.got or ""))
    if result.where:
        console.print(Text(f"  at        {result.where[-1]}"))
    console.print(Text(f"  test      {result.test}", "dim"))


def counts(results: list[Result], work: Exercise, console: Console) -> None:
    for own, what in ((True, f"of phase {work.phase.number}"), (False, "of every phase")):
        kind = [r.outcome for r in results if r.own == own and r.outcome != "skipped"]
        if kind:
            console.print(Text(f"{kind.count('passes')} of {len(kind)} tests {what} pass", "bold"))


def advise(failed: list[Result], stub: Stub | None, command: str, step: str | None, console: Console) -> None:
    """Print the last line of a report: what to do next, and where help is. step: of help, None without an exercise."""
    if not failed:
        console.print(Text(f"Every test passes.{f' Compare: {command} --diff' if step else ''}", "bold green"))
        return
    first = failed[0]
    what = "Write next" if first.outcome == "not written yet" else "First wrong"
    stuck = f" Stuck? {command} --{step}" if stub and step else ""
    console.print(Text.assemble((f"{what}: ", "bold"), f"{f'{stub}()' if stub else first.title}.{stuck}"))


def _scope(folder: Path) -> tuple[bool, str | None]:
    """Return what the folder's exercise empties: everything, and if not, the part; a shipped phase is whole."""
    try:
        notes = json.loads((folder / EXERCISE_FILE).read_text(encoding="utf-8"))
        return bool(notes["all"]), notes["part"]
    except (OSError, ValueError, KeyError, TypeError):
        return True, None


def find_exercise(number: int, folder: Path, root: Path) -> tuple[Exercise, Path]:
    """Return the exercise and the folder's resolved path. UserError if there is nothing to check, or no test."""
    path = folder.resolve()
    work = exercise(phases(root), number, *_scope(path))
    package = work.phase.package
    if not (path / "engine" / "__init__.py").is_file():
        raise UserError(f"{folder} holds no engine; name a folder that `lab start {number} DIR` made")
    try:
        real = phase_of(str(path / "engine"))
    except (ValueError, KeyError, TypeError):
        raise UserError(
            f"{folder} has no {EXERCISE_FILE}; copy your engine into a fresh `lab start {number} DIR`"
        ) from None
    if real != number:
        raise UserError(f"{folder} is of phase {real}; check it with `lab check {real} {folder}`")
    missing = [file for file in work.sources if not (path / file).is_file()]
    if missing:
        raise UserError(f"{folder} lacks {', '.join(missing)}; take it from a fresh `lab start {number} DIR`")
    if not (root / "tests" / package).is_dir():
        raise UserError(
            f"there are no tests/{package} here; a wheel has none: run this in a checkout of the repository"
        )
    if importlib.util.find_spec("pytest") is None:
        raise UserError("pytest is not installed; `make install`, or `pip install -e '.[dev]'`")
    return work, path


def run(arguments: list[str], root: Path = ROOT) -> int:
    parser = Parser("lab check", "Run a phase's own tests on a folder in which you write that phase.")
    parser.add_argument("number", metavar="N", type=int, help="the number of the phase")
    parser.add_argument("folder", metavar="DIR", type=Path, help="a folder that lab start made, or the phase's own")
    parser.add_argument("-k", metavar="WORDS", help="only tests whose name has these words (as pytest takes them)")
    coach = parser.add_mutually_exclusive_group()
    coach.add_argument(
        "--hint", dest="help_step", action="store_const", const="hint", help="a hint for the first failure"
    )
    coach.add_argument(
        "--diff",
        dest="help_step",
        action="store_const",
        const="diff",
        help="then: your function beside the shipped one; once all tests pass: all of them",
    )
    coach.add_argument(
        "--solution", dest="help_step", action="store_const", const="solution", help="then: the shipped function"
    )
    parser.add_argument("-v", "--verbose", action="store_true", help="list every test")
    options = parser.parse_args(arguments)
    work, folder = find_exercise(options.number, options.folder, root)
    coach_ = Coach(work, folder) if options.help_step else None
    extra = [*(["-k", options.k] if options.k else []), *(["--exitfirst"] if coach_ else [])]
    results = run_tests(work, folder, root, extra)
    if not results:
        raise UserError(f"no test was run: none has {options.k!r} in its name" if options.k else "no test was found")

    console = Console(highlight=False, soft_wrap=True)
    failed = [result for result in results if result.outcome in ("fails", "not written yet")]
    stub = failed[0].stub(work) if failed else None
    if coach_ and not failed and options.help_step == "diff":
        for each in work.stubs:
            coach_.compare(each, console)
    elif coach_ and not failed:
        console.print("Every test passes: there is nothing to help with (--diff shows the shipped functions).")
    elif coach_:
        explain(failed[0], stub, console)
        console.print()
        if stub is None:
            raise UserError(f"this failure belongs to no single function; read the test, {failed[0].test}")
        coach_.give(options.help_step, stub, console)
    else:
        if failed:
            explain(failed[0], stub, console, LINES)
            console.print()
        (report if options.verbose else summary)(results, work, console)
        counts(results, work, console)
        started = (folder / EXERCISE_FILE).is_file()
        step = (Coach(work, folder).next_help(stub) if stub else "diff") if started else None
        advise(failed, stub, f"lab check {options.number} {options.folder}", step, console)
    return 1 if failed else 0

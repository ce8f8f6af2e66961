"""`lab check`: run a phase's own tests on a folder in which somebody writes that phase, and help with failures.

The report says, test by test, what passes, fails or is not written yet, which function to write next, and for
the first failure the expected and the actual value. The tests of every phase run too, so regressions show. Slow tests,
those that need a GPU, and those marked `no_exercise` are left out.

    lab check 2 my-phase-2
    lab check 2 my-phase-2 --hint
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

TIME_LIMIT = 60.0  # seconds for one test; a longer one is taken for endless
STYLES = {"passes": "green", "fails": "red", "not written yet": "yellow", "not run": "dim", "skipped": "dim"}
WIDTH = max(map(len, STYLES))


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
    marks = "not slow and not gpu and not no_exercise"
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


def report(results: list[Result], console: Console) -> None:
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


def explain(result: Result, stub: Stub | None, console: Console) -> None:
    """Print the first failure: the function to write, or the expected and the actual value."""
    if result.outcome == "not written yet":
        console.print(Text.assemble(("Write next: ", "bold"), result.message.removeprefix("not written yet: ")))
        console.print(Text(f"  test      {result.test}", "dim"))
        return
    console.print(Text.assemble(("First wrong: ", "bold"), f"{result.title}{f', in {stub}()' if stub else ''}"))
    for line in [result.words, *result.message.splitlines()[:12]]:
        if line.strip():
            console.print(Text(f"  {line.strip()}"))
    if result.expected is not None:
        console.print(Text.assemble(("  expected  ", "green"), result.expected))
        console.print(Text.assemble(("  got       ", "red"), result.got or ""))
    if result.where:
        console.print(Text(f"  at        {result.where[-1]}"))
    console.print(Text(f"  test      {result.test}", "dim"))


def find_exercise(number: int, folder: Path, root: Path) -> tuple[Exercise, Path]:
    """Return the exercise and the folder's resolved path. UserError if there is nothing to check, or no test."""
    work = exercise(phases(root), number)
    path, package = folder.resolve(), work.phase.package
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
        help="then: your function beside the shipped one",
    )
    coach.add_argument(
        "--solution", dest="help_step", action="store_const", const="solution", help="then: the shipped function"
    )
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
    if coach_ and not failed:
        console.print("Every test passes: there is nothing to help with.")
    elif coach_:
        explain(failed[0], stub, console)
        console.print()
        if stub is None:
            raise UserError(f"this failure belongs to no single function; read the test, {failed[0].test}")
        coach_.give(options.help_step, stub, console)
    else:
        report(results, console)
        console.print()
        for own, what in ((True, f"of phase {work.phase.number}"), (False, "of every phase")):
            kind = [r.outcome for r in results if r.own == own and r.outcome != "skipped"]
            if kind:
                console.print(Text(f"{kind.count('passes')} of {len(kind)} tests {what} pass", "bold"))
        if failed:
            console.print()
            explain(failed[0], stub, console)
            if stub and (folder / EXERCISE_FILE).is_file():
                step = Coach(work, folder).next_help(stub)
                console.print(Text(f"Stuck? lab check {options.number} {options.folder} --{step}"))
    return 1 if failed else 0

"""Run every mutant of tests/mutants/ against the quick tests of its subject, and report the survivors.

Each mutant runs in a copy of the repository, in a process forked from this one, so that torch is imported once. First
the tests must pass without a mutant. Exit status 1 if a mutant survives that the lists do not call equivalent. A test
that noticed a mutant runs first for the next mutant. Mutants in C++ come last, because each is compiled.

    make mutants
    python -m tests.support.mutation verify.py kv_cache     (those with one of these words in their name)
    python -m tests.support.mutation --outcomes FILE        (adds each outcome to the file, as a line of JSON; what the
                                                             file already has as it should be is not run)
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Generator
from dataclasses import dataclass
from pathlib import Path

import hypothesis
import pytest

from tests.support.mutants import Mutant, replaced

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 600.0  # CPU seconds for one mutant; a longer one is taken for endless
WAITS = 12  # times as long in wall time, for a mutant that waits without computing
HEAVY = ("torch", "transformers", "scipy.stats", "hypothesis", "jsonschema", "safetensors.torch")
SKIPPED = shutil.ignore_patterns("results", ".git", ".venv", "__pycache__", "*.ipynb", ".*_cache")
OUTCOMES = {0: "survived", 1: "killed"}  # by pytest's status; others mean that the tests could not be run


@dataclass(frozen=True)
class Outcome:
    mutant: Mutant | None  # None: no mutant
    tests: tuple[str, ...]
    became: str
    seconds: float
    by: str  # the first test that failed
    said: str  # the end of what pytest said

    @property
    def name(self) -> str:
        return name_of(self.mutant, self.tests)


def name_of(mutant: Mutant | None, tests: tuple[str, ...]) -> str:
    return mutant.name if mutant else f"without a mutant: {' '.join(tests)}"


def every_mutant() -> list[Mutant]:
    """Of all lists, in the order of their files, but C++ last."""
    files = sorted((ROOT / "tests" / "mutants").glob("*.py"))
    modules = [importlib.import_module(f"tests.mutants.{file.stem}") for file in files]
    found = [mutant for module in modules for mutant in module.MUTANTS]
    return sorted(found, key=lambda mutant: mutant.file.endswith(".cpp"))


def copied(root: Path, folder: Path) -> Path:
    """Copy the repository so that the phases can be imported by their names."""
    shutil.copytree(root, folder, ignore=SKIPPED)
    links = folder / ".venv" / "phases"
    links.mkdir(parents=True)
    for phase in sorted(folder.glob("phase-*")):
        (links / f"phase{phase.name.split('-')[1]}").symlink_to(phase / "engine")
    return folder


def built(folder: Path) -> Path:
    """A folder with what the user has compiled, so that of a mutant in C++ only its own file is compiled."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llm-inference-lab" / "kernels"
    if cache.is_dir():
        shutil.copytree(cache, folder, ignore=shutil.ignore_patterns("*.lock", "*.building-*"))
    return folder


class First:
    """A plugin of pytest: these tests first. And random examples are the same every time, and not made smaller."""

    def __init__(self, names: list[str]) -> None:
        self.names = names

    def pytest_configure(self) -> None:
        parts = (hypothesis.Phase.explicit, hypothesis.Phase.generate)
        hypothesis.settings.register_profile("mutants", deadline=None, derandomize=True, phases=parts, database=None)
        hypothesis.settings.load_profile("mutants")

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items.sort(key=lambda item: item.nodeid not in self.names)


def start(copy: Path, tests: tuple[str, ...], first: list[str], limit: float, log: Path) -> int:
    """The number of a process that runs these tests in the copy, and writes what pytest says into the log."""
    sys.stdout.flush()
    if process := os.fork():
        return process
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CPU, (int(limit), int(limit) + 5))
    os.setsid()
    os.chdir(copy)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.dont_write_bytecode = True  # bytecode would hide a change within the same second
    folders = [str(copy), str(copy / ".venv" / "phases")]
    os.environ |= {"PYTHONPATH": os.pathsep.join(folders), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    os.environ["SPECDEC_BUILD_DIR"] = str(copy.parent / "kernels")
    sys.path[:0] = folders
    for name in list(sys.modules):  # modules of the repository itself
        if re.match(r"(tests|common|phase\d+)(\.|$)", name):
            del sys.modules[name]
    status = 3
    try:
        options = ["--exitfirst", "-q", "-m", "not slow and not gpu", "-p", "no:cacheprovider", "-p", "no:xdist"]
        status = int(pytest.main([*options, *tests], plugins=[First(first)]))
        sys.stdout.flush()
    finally:
        os._exit(status)


class Running:
    """One copy, and the mutant that is tested in it."""

    def __init__(
        self, copy: Path, mutant: Mutant | None, tests: tuple[str, ...], first: list[str], limit: float
    ) -> None:
        self.copy, self.mutant, self.tests, self.limit = copy, mutant, tests, limit
        self.log = copy.with_suffix(".log")
        self.original = ""
        if mutant is not None:
            file = copy / mutant.file
            self.original = file.read_text(encoding="utf-8")
            assert self.original.count(mutant.old) == 1, f"not once in {mutant.file}: {mutant.old}"
            file.write_text(replaced(self.original, mutant.file, [(mutant.old, mutant.new)]), encoding="utf-8")
        self.began = time.monotonic()
        self.process = start(copy, tests, first, limit, self.log)

    def kill(self) -> None:
        """The process and what it has started; as long as it has no group of its own, itself."""
        with contextlib.suppress(ProcessLookupError):
            try:
                os.killpg(self.process, signal.SIGKILL)
            except ProcessLookupError:
                os.kill(self.process, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self.process, 0)

    def ended(self) -> Outcome | None:
        """What became of it, once it has ended; the copy is then as it was."""
        process, status = os.waitpid(self.process, os.WNOHANG)
        seconds = time.monotonic() - self.began
        code = os.waitstatus_to_exitcode(status) if process else None
        if seconds > self.limit * WAITS and code is None:
            code = -signal.SIGXCPU
        if code is None:
            return None
        self.kill()  # what its tests may have left
        if self.mutant is not None:
            (self.copy / self.mutant.file).write_text(self.original, encoding="utf-8")
        said = self.log.read_text(encoding="utf-8", errors="replace") if self.log.exists() else ""
        by = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", said, re.MULTILINE)
        end = "\n".join(said.strip().splitlines()[-12:])
        if code < 0 and self.mutant is not None:  # a crash, or a loop that never ends, is noticed
            by_signal = "it does not end" if code == -signal.SIGXCPU else "it crashes"
            return Outcome(self.mutant, self.tests, "killed", seconds, by_signal, end)
        return Outcome(self.mutant, self.tests, OUTCOMES.get(code, "broken"), seconds, by[1] if by else "", end)


def run(
    mutants: list[Mutant],
    root: Path,
    folder: Path,
    jobs: int = 1,
    limit: float = LIMIT,
    say: Callable[[str], None] = print,
    done: Collection[str] = (),
) -> Generator[Outcome]:
    """Every mutant, and before those with the same tests these tests without a mutant; as they end.

    `folder` holds the copies; `done` names what is not run. However it ends, no process stays.
    """
    copies = [copied(root, folder / f"copy-{number}") for number in range(jobs)]
    groups: dict[tuple[str, ...], list[Mutant | None]] = {mutant.tests: [None] for mutant in mutants}
    for one in mutants:
        groups[one.tests].append(one)
    every = [(mutant, tests) for tests, group in groups.items() for mutant in group]
    waiting = [(mutant, tests) for mutant, tests in every if name_of(mutant, tests) not in done]
    say(f"{len(waiting)} runs, {jobs} at a time")
    running: list[Running] = []
    killers: dict[tuple[str, ...], list[str]] = {}
    try:
        while waiting or running:
            while waiting and copies:
                mutant, tests = waiting.pop(0)
                running.append(Running(copies.pop(), mutant, tests, killers.get(tests, []), limit))
            for each in list(running):
                if (outcome := each.ended()) is not None:
                    running.remove(each)
                    copies.append(each.copy)
                    if outcome.by and outcome.by not in killers.setdefault(outcome.tests, []):
                        killers[outcome.tests].append(outcome.by)
                    yield outcome
            time.sleep(0.05)
    finally:
        for each in running:
            each.kill()


def verdict(outcome: Outcome) -> tuple[str, bool]:
    """A line that says what became of it, and whether that is right."""
    mutant, became, said = outcome.mutant, outcome.became, outcome.said
    if mutant is None:
        good = became == "survived"
        line = f"{'passes' if good else 'FAILS'} {outcome.name}"
        return line if good else f"{line}\n{said}", good
    if became == "broken":
        return f"BROKEN   {mutant.name}\n{said}", False
    if mutant.equivalent:
        good = became == "survived"
        note = mutant.equivalent if good else "NOT EQUIVALENT, for a test fails"
        return f"{became:<8} {mutant.name} ({note})", good
    return f"{became if became == 'killed' else 'SURVIVED':<8} {mutant.name}", became == "killed"


def right(file: Path) -> set[str]:
    """The names of those that the file has as they should be."""
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    return {line["name"] for line in map(json.loads, lines) if line["right"]}


def keep(file: Path, outcome: Outcome, good: bool) -> None:
    """Adds a line to the file."""
    equivalent = bool(outcome.mutant and outcome.mutant.equivalent and good)
    line = {
        "name": outcome.name,
        "outcome": "equivalent" if equivalent else outcome.became,
        "right": good,
        "seconds": round(outcome.seconds, 1),
        "by": outcome.by,
    }
    with file.open("a", encoding="utf-8") as opened:
        opened.write(json.dumps(line) + "\n")


def stop(number: int, frame: object) -> None:
    """Ends the program by an exception, so that what it has started is ended too, and its copies are removed."""
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.SIG_IGN)
    sys.exit(128 + number)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.support.mutation")
    parser.add_argument("words", nargs="*", help="only mutants with one of these in their name")
    parser.add_argument("--outcomes", type=Path, help="a file to add to; what it has as it should be is not run")
    options = parser.parse_args(arguments)
    words = options.words
    chosen = [mutant for mutant in every_mutant() if not words or any(word in mutant.name for word in words)]
    if not chosen:
        print(f"error: no mutant has one of these words in its name: {' '.join(words)}", file=sys.stderr)
        return 2
    done = right(options.outcomes) if options.outcomes else set()
    for name in HEAVY:
        importlib.import_module(name)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    wrong = 0
    with tempfile.TemporaryDirectory(prefix="mutants-") as temporary:
        built(Path(temporary) / "kernels")
        outcomes = run(chosen, ROOT, Path(temporary), jobs=max(1, os.cpu_count() or 1), done=done)
        with contextlib.closing(outcomes):
            for outcome in outcomes:
                line, good = verdict(outcome)
                wrong += not good
                print(line, flush=True)
                if options.outcomes:
                    keep(options.outcomes, outcome, good)
    print(f"{wrong} of {len(chosen)} mutants are not as the lists say" if wrong else "all mutants are as the lists say")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

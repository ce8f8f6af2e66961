"""Run every mutant of tests/mutants/ against the quick tests of its subject, and report the survivors.

Each mutant runs in a copy of the repository, in a process forked from this one, so that torch is imported once. First
the tests must pass without a mutant. Exit status 1 if a mutant survives that the lists do not call equivalent.

    make mutants
    python -m tests.support.mutation verify.py kv_cache     (those with one of these words in their name)
"""

from __future__ import annotations

import importlib
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.mutants import Mutant, replaced

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 900.0  # seconds for one mutant; a longer one is taken for endless. C++ compiles for minutes on a busy machine
HEAVY = ("torch", "transformers", "scipy.stats", "hypothesis", "jsonschema", "safetensors.torch")
SKIPPED = shutil.ignore_patterns("results", ".git", ".venv", "__pycache__", "*.ipynb", ".*_cache")
OUTCOMES = {0: "survived", 1: "killed"}  # by pytest's status; others mean that the tests could not be run

Outcome = tuple[Mutant | None, tuple[str, ...], str, str]
"""A mutant (None: no mutant), its tests, the outcome, and the end of pytest's output."""


def every_mutant() -> list[Mutant]:
    """Return all mutants, in the order of the lists' files."""
    files = sorted((ROOT / "tests" / "mutants").glob("*.py"))
    modules = [importlib.import_module(f"tests.mutants.{file.stem}") for file in files]
    return [mutant for module in modules for mutant in module.MUTANTS]


def copied(root: Path, folder: Path) -> Path:
    """Copy the repository so that the phases can be imported by their names."""
    shutil.copytree(root, folder, ignore=SKIPPED)
    links = folder / ".venv" / "phases"
    links.mkdir(parents=True)
    for phase in sorted(folder.glob("phase-*")):
        (links / f"phase{phase.name.split('-')[1]}").symlink_to(phase / "engine")
    return folder


def start(copy: Path, tests: tuple[str, ...], log: Path) -> int:
    """Start a process that runs these tests in the copy and writes pytest's output to the log; return its number."""
    sys.stdout.flush()
    if process := os.fork():
        return process
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
        status = int(pytest.main([*options, *tests]))
        sys.stdout.flush()
    finally:
        os._exit(status)


class Running:
    """One copy, and the mutant that is tested in it."""

    def __init__(self, copy: Path, mutant: Mutant | None, tests: tuple[str, ...]) -> None:
        self.copy, self.mutant, self.tests = copy, mutant, tests
        self.log = copy.with_suffix(".log")
        self.original = ""
        if mutant is not None:
            file = copy / mutant.file
            self.original = file.read_text(encoding="utf-8")
            assert self.original.count(mutant.old) == 1, f"not once in {mutant.file}: {mutant.old}"
            file.write_text(replaced(self.original, mutant.file, [(mutant.old, mutant.new)]), encoding="utf-8")
        self.began = time.monotonic()
        self.process = start(copy, tests, self.log)

    def ended(self, limit: float) -> Outcome | None:
        """Return the outcome once the run has ended, and restore the copy."""
        process, status = os.waitpid(self.process, os.WNOHANG)
        outcome = None
        if process:
            outcome = OUTCOMES.get(os.waitstatus_to_exitcode(status), "broken")
        elif time.monotonic() - self.began > limit:
            os.killpg(self.process, signal.SIGKILL)
            os.waitpid(self.process, 0)
            outcome = "killed"  # an endless loop counts as killed
        if outcome is None:
            return None
        if self.mutant is not None:
            (self.copy / self.mutant.file).write_text(self.original, encoding="utf-8")
        said = self.log.read_text(encoding="utf-8", errors="replace") if self.log.exists() else ""
        return self.mutant, self.tests, outcome, "\n".join(said.strip().splitlines()[-12:])


def run(
    mutants: list[Mutant],
    root: Path,
    folder: Path,
    jobs: int = 1,
    limit: float = LIMIT,
    say: Callable[[str], None] = print,
) -> Iterator[Outcome]:
    """Yield outcomes as they end: first the tests without any mutant, then every mutant. `folder` holds the copies."""
    copies = [copied(root, folder / f"copy-{number}") for number in range(jobs)]
    waiting: list[tuple[Mutant | None, tuple[str, ...]]] = [(None, tests) for tests in {m.tests: 0 for m in mutants}]
    waiting += [(mutant, mutant.tests) for mutant in mutants]
    say(f"{len(mutants)} mutants, and {len(waiting) - len(mutants)} runs without one; {jobs} at a time")
    running: list[Running] = []
    while waiting or running:
        while waiting and copies:
            mutant, tests = waiting.pop(0)
            running.append(Running(copies.pop(), mutant, tests))
        for each in list(running):
            if (outcome := each.ended(limit)) is not None:
                running.remove(each)
                copies.append(each.copy)
                yield outcome
        time.sleep(0.05)


def verdict(outcome: Outcome) -> tuple[str, bool]:
    """Return a line that reports the outcome, and whether it is as expected."""
    mutant, tests, became, said = outcome
    if mutant is None:
        good = became == "survived"
        line = f"{'passes' if good else 'FAILS'} without a mutant: {' '.join(tests)}"
        return line if good else f"{line}\n{said}", good
    if became == "broken":
        return f"BROKEN   {mutant.name}\n{said}", False
    if mutant.equivalent:
        good = became == "survived"
        note = mutant.equivalent if good else "NOT EQUIVALENT, for a test fails"
        return f"{became:<8} {mutant.name} ({note})", good
    return f"{became if became == 'killed' else 'SURVIVED':<8} {mutant.name}", became == "killed"


def main(words: list[str]) -> int:
    chosen = [mutant for mutant in every_mutant() if not words or any(word in mutant.name for word in words)]
    if not chosen:
        print(f"error: no mutant has one of these words in its name: {' '.join(words)}", file=sys.stderr)
        return 2
    for name in HEAVY:
        importlib.import_module(name)
    wrong = 0
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        for outcome in run(chosen, ROOT, Path(folder), jobs=max(1, os.cpu_count() or 1)):
            line, good = verdict(outcome)
            wrong += not good
            print(line, flush=True)
    print(f"{wrong} of {len(chosen)} mutants are not as the lists say" if wrong else "all mutants are as the lists say")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""The lists of mutants match the sources, and the runner tells surviving mutants from killed ones."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.mutation import ROOT, every_mutant

MUTANTS = every_mutant()


def test_every_mutant_replaces_something_that_is_there_once() -> None:
    stale = [each.name for each in MUTANTS if (ROOT / each.file).read_text(encoding="utf-8").count(each.old) != 1]
    assert stale == []
    assert [each.name for each in MUTANTS if each.old == each.new] == []
    assert len({each.name for each in MUTANTS}) == len(MUTANTS) >= 60


def test_every_mutant_has_tests_that_are_there() -> None:
    files = {test for each in MUTANTS for test in each.tests if test.startswith("tests/")}
    assert [file for file in sorted(files) if not (ROOT / file).is_file()] == []
    assert all(any(test.startswith("tests/") for test in each.tests) for each in MUTANTS)


START = """
import os
from pathlib import Path
from tests.support.mutants import mutants
from tests.support.mutation import run, verdict
tests = ("tests/test_thing.py",)
root, work = Path("ROOT"), Path("WORK")
"""
PROGRAM = """
listed = mutants("thing.py", tests, ("a + b", "a - b"), ("a * b", "b * a"), ("a * b", "a * b * 1", "a factor of 1"),
    ("a + b", "b + a", "commutes"), ("a + b", "a +"), ("a + b", "sum(iter(int, 1))"))
lines = [verdict(outcome) for outcome in run(listed, root, work, limit=10, say=lambda line: None)]
print([(line.split()[0], good) for line, good in lines])
"""
STOPPED = """
listed = mutants("thing.py", tests, ("a * b", "b * a"), ("a + b", "sum(iter(int, 1))"))
running = run(listed, root, work, jobs=2, say=lambda line: None, done=[listed[0].name])
print(verdict(next(running)))
running.close()
try:
    os.waitpid(-1, os.WNOHANG)
except ChildProcessError:
    print("no process is left")
"""


def run_on_a_thing(tmp_path: Path, program: str) -> str:
    """What the program prints, which has a repository of one file and one test."""
    work, root = tmp_path / "work", tmp_path / "repository"
    (root / "tests").mkdir(parents=True)
    (root / "thing.py").write_text("def add(a, b):\n    return a + b\n\n\ndef times(a, b):\n    return a * b\n")
    test = "from thing import add\n\n\ndef test_it():\n    assert add(2, 3) == 5\n"
    (root / "tests" / "test_thing.py").write_text(test)
    start = START.replace("ROOT", str(root)).replace("WORK", str(work))
    done = subprocess.run(
        [sys.executable, "-c", start + program],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.stderr == ""
    return done.stdout


@pytest.mark.slow
def test_what_becomes_of_mutants(tmp_path: Path) -> None:
    """Noticed, not noticed, equivalent, one that cannot be imported, and one that never ends; the copy is as before."""
    assert run_on_a_thing(tmp_path, PROGRAM).strip() == str(
        [
            ("passes", True),
            ("killed", True),
            ("SURVIVED", False),
            ("survived", True),
            ("survived", True),
            ("BROKEN", False),
            ("killed", True),
        ]
    )
    assert (tmp_path / "work" / "copy-0" / "thing.py").read_text() == (tmp_path / "repository" / "thing.py").read_text()


def test_a_run_that_is_stopped_leaves_no_process(tmp_path: Path) -> None:
    """The mutant in the second copy would compute for ever; what is done already is not run."""
    first, last = run_on_a_thing(tmp_path, STOPPED).splitlines()
    assert first == str(("passes without a mutant: tests/test_thing.py", True))
    assert last == "no process is left"


@pytest.mark.slow
def test_no_mutant_survives() -> None:
    """`make mutants` takes an hour on two cores: every C++ mutant is compiled."""
    done = subprocess.run([sys.executable, "-m", "tests.support.mutation"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout

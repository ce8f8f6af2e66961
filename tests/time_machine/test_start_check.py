"""`lab start` and `lab check` on a course of two small phases, where a check takes a second."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from common.errors import UserError
from common.lab import check, start
from common.lab.check_plugin import FolderFinder
from common.phases import phase_of, phases

NEW = '''"""Doubling."""

from __future__ import annotations

from dataclasses import dataclass

from .core import base

LIMIT = 10  # the largest result


@dataclass(frozen=True)
class Box:
    """Holds a number."""

    value: int  # in units

    def doubled(self) -> int:
        """Twice the value."""
        return twice(self.value)


def twice(x: int) -> int:
    """Twice x, at most LIMIT."""
    return _clipped(2 * x * base())


def _clipped(x: int) -> int:
    return min(x, LIMIT)
'''
README = """# Two

## What changed since phase 1

    + engine/new.py       doubling
    ~ engine/__init__.py  exports

## Exercise

- engine/new.py, twice: the result has
  a limit
- engine/new.py: two more words

## What comes next
"""
TESTS = '''"""Doubling, by hand."""

import subprocess
import sys

import pytest

import phase2


@pytest.mark.about("engine/new.py, Box.doubled")
def test_a_box():
    assert phase2.Box(2).doubled() == 4


@pytest.mark.about("engine/new.py, twice")
@pytest.mark.parametrize("x", [1, 2, 6])
def test_doubling(x):
    """At most ten."""
    assert phase2.twice(x) == min(2 * x, 10), f"x {x}"


def test_other_processes():
    command = [sys.executable, "-c", "import phase2; print(phase2.twice(3))"]
    assert subprocess.run(command, capture_output=True, text=True).stdout == "6\\n"


@pytest.mark.no_exercise
def test_what_is_given():
    assert phase2.base() == 1
'''
EVERY_PHASE = '''"""The base of everything."""

import importlib

import pytest

from common.phases import phases


@pytest.mark.parametrize("phase", phases(), ids=str)
def test_the_base(phase, tmp_path):
    assert phases(tmp_path) == []  # another repository has its own
    module = importlib.import_module(phase.package)
    assert module.base() == 1
    assert module.__file__ == str(phase.folder / "engine/__init__.py")
'''
FILES = {
    "phase-1-one/README.md": "# One\n",
    "phase-1-one/engine/__init__.py": "from .core import base\n",
    "phase-1-one/engine/core.py": "def base() -> int:\n    return 1\n",
    "phase-2-two/README.md": README,
    "phase-2-two/lesson.ipynb": "{}",
    "phase-2-two/generate.py": "import engine\n",
    "phase-2-two/engine/__init__.py": "from .core import base\nfrom .new import Box, twice\n",
    "phase-2-two/engine/core.py": "def base() -> int:\n    return 1\n",
    "phase-2-two/engine/new.py": NEW,
    "tests/phase2/test_new.py": TESTS,
    "tests/every_phase/test_base.py": EVERY_PHASE,
    "pytest.ini": "[pytest]\naddopts = --import-mode=importlib\nmarkers =\n  about(f)\n  no_exercise\n  slow\n  gpu\n",
}
Run = Callable[..., tuple[int, str]]


@pytest.fixture
def course(tmp_path: Path) -> Path:
    for path, text in FILES.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    return tmp_path


@pytest.fixture
def folder(course: Path) -> Path:
    """Make a fresh exercise of the small course."""
    start.start(phases(course), 2, course / "mine")
    return course / "mine"


@pytest.fixture
def run_check(course: Path, forked_check: None, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run `lab check 2 FOLDER OPTIONS` in the small course: exit status and stdout."""

    def run(folder: Path, *options: str) -> tuple[int, str]:
        capsys.readouterr()
        return check.run(["2", str(folder), *options], course), capsys.readouterr().out

    return run


def write(folder: Path, *changes: tuple[str, str]) -> None:
    """Write engine/new.py as shipped, with these changes."""
    text = NEW
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    (folder / "engine/new.py").write_text(text)


def test_the_folder(folder: Path, course: Path) -> None:
    text = (folder / "engine/new.py").read_text()
    assert "LIMIT = 10  # the largest result" in text
    assert "value: int  # in units" in text
    assert "_clipped" not in text
    assert text.count("raise NotImplementedError") == 2
    assert '"not written yet: engine/new.py, twice(): Twice x, at most LIMIT."' in text
    for path in ("engine/__init__.py", "engine/core.py", "generate.py"):
        assert (folder / path).read_bytes() == (course / "phase-2-two" / path).read_bytes()
    assert not (folder / "lesson.ipynb").exists()
    assert phase_of(str(folder / "engine/cli.py")) == 2
    guide = (folder / "EXERCISE.md").read_text()
    assert guide.index("`twice`: Twice x") < guide.index("`Box.doubled`"), "the order of the hints"
    assert f"lab check 2 {folder}" in guide
    assert "`engine/__init__.py`" in guide


def test_a_fresh_folder_passes_nothing(folder: Path, run_check: Run) -> None:
    status, out = run_check(folder, "--verbose")
    assert status == 1
    assert "0 of 5 tests of phase 2 pass" in out
    assert "1 of 1 tests of every phase pass" in out
    assert re.search(r"engine/new.py, twice\n  not written yet +doubling \(0 of 3 cases pass\)", out)
    first, *_, last = out.strip().splitlines()
    assert first == "Write next: engine/new.py, twice(): Twice x, at most LIMIT."
    assert last == f"Write next: engine/new.py, twice(). Stuck? lab check 2 {folder} --hint"
    assert f"lab check 2 {folder} --hint" in out


def test_the_shipped_phase_passes(course: Path, run_check: Run) -> None:
    status, out = run_check(course / "phase-2-two")
    assert status == 0
    assert "5 of 5 tests of phase 2 pass" in out
    assert "what is given" not in out


def test_half_of_it_gives_partial_credit(folder: Path, run_check: Run) -> None:
    write(
        folder,
        ("return twice(self.value)", 'raise NotImplementedError("not written yet: engine/new.py, Box.doubled()")'),
    )
    status, out = run_check(folder)
    assert status == 1
    assert "4 of 5 tests of phase 2 pass" in out
    assert "Write next: engine/new.py, Box.doubled()" in out


def test_a_half_right_rule_is_shown_with_what_was_expected(folder: Path, run_check: Run) -> None:
    write(folder, ("min(x, LIMIT)", "x"))
    status, out = run_check(folder, "--verbose")
    assert status == 1
    assert "fails            doubling (2 of 3 cases pass)" in out
    assert (
        "First wrong: doubling, in engine/new.py, twice()\n  At most ten.\n  x 6\n  expected  10\n  got       12\n"
        in out
    )


def test_an_error_is_shown_with_its_place(folder: Path, run_check: Run) -> None:
    write(folder, ("return min(x, LIMIT)", "return min(x, LIMITS)"))
    _, out = run_check(folder)
    assert re.search(r"NameError: name 'LIMITS' is not defined.*\n  at +engine/new.py, _clipped, line \d+\n", out)


def test_help_comes_a_little_at_a_time(folder: Path, run_check: Run) -> None:
    write(folder, ("min(x, LIMIT)", "x"))
    with pytest.raises(UserError, match=r"--solution for engine/new\.py, twice comes after --hint"):
        run_check(folder, "--solution")
    assert "Hint for engine/new.py, twice: the result has a limit\n" in run_check(folder, "--hint")[1]
    with pytest.raises(UserError, match="after --diff"):
        run_check(folder, "--solution")
    (folder / "engine/new.py").write_text(NEW.replace("_clipped(2 * x * base())", "2 * x"))
    out = run_check(folder, "--diff")[1]
    assert "\n-    return 2 * x\n+    return _clipped(2 * x * base())\n" in out
    out = run_check(folder, "--solution")[1]
    assert "return _clipped(2 * x * base())" in out
    assert "return min(x, LIMIT)" in out, "the helper is part of the solution"
    assert "--solution" in run_check(folder)[1]
    write(folder)
    assert "nothing to help with" in run_check(folder, "--hint")[1]


def test_an_unwritten_function_has_nothing_to_compare(folder: Path, run_check: Run) -> None:
    run_check(folder, "--hint")
    assert "twice is not written yet" in run_check(folder, "--diff")[1]
    assert "def twice" in run_check(folder, "--solution")[1]


def test_the_report_is_short_and_begins_and_ends_with_what_matters(folder: Path, run_check: Run) -> None:
    write(folder, ("min(x, LIMIT)", "x"))
    lines = run_check(folder)[1].strip().splitlines()
    assert len(lines) < 30
    assert lines[0] == "First wrong: doubling, in engine/new.py, twice()"
    assert lines[-1].startswith("First wrong: engine/new.py, twice(). Stuck? ")
    assert "  to do engine/new.py, twice        2 of 3 tests" in lines
    assert "  done  engine/new.py, Box.doubled  1 of 1 tests" in lines


def test_what_passes_can_be_compared(folder: Path, run_check: Run) -> None:
    write(folder, ("return _clipped(2 * x * base())", "return min(2 * x, LIMIT)"))
    status, out = run_check(folder)
    assert status == 0
    assert out.strip().endswith(f"Every test passes. Compare: lab check 2 {folder} --diff")
    out = run_check(folder, "--diff")[1]
    assert "-    return min(2 * x, LIMIT)\n+    return _clipped(2 * x * base())\n" in out
    assert "engine/new.py, Box.doubled: as shipped" in out


def test_the_core_path_alone_is_empty(course: Path, run_check: Run) -> None:
    """Functions with a time are to be written; everything else, their helpers too, is given."""
    readme = course / "phase-2-two/README.md"
    readme.write_text(readme.read_text().replace("engine/new.py, twice:", "engine/new.py, twice (5 min):"))
    work = start.start(phases(course), 2, course / "core")
    assert list(map(str, work.stubs)) == ["engine/new.py, twice"]
    text = (course / "core/engine/new.py").read_text()
    assert "return min(x, LIMIT)" in text
    assert "return twice(self.value)" in text
    guide = (course / "core/EXERCISE.md").read_text()
    assert "`twice` (5 min): Twice x" in guide
    assert "about 5 minutes" in guide
    assert "Box.doubled" not in guide
    assert "  to do engine/new.py, twice  0 of 3 tests" in run_check(course / "core")[1]
    whole = start.start(phases(course), 2, course / "whole", everything=True)
    assert len(whole.stubs) == 2
    assert "Box.doubled" in (course / "whole/EXERCISE.md").read_text()
    with pytest.raises(UserError, match=r"phase 2 has no exercise of a part 'fast'"):
        start.start(phases(course), 2, course / "part", part="fast")


def test_a_test_that_does_not_end(folder: Path, run_check: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "TIME_LIMIT", 1.0)
    write(folder, ("return _clipped(2 * x * base())", "while True:\n        pass"))
    _, out = run_check(folder, "--verbose")
    assert "stopped after 1 s" in out
    assert "at        engine/new.py, twice, line" in out
    assert re.search(r"not run +a box", out)
    assert "0 of 5 tests of phase 2 pass" in out


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("def (", r"engine cannot be imported: .*SyntaxError: .*new\.py, line 31"),
        ("1 / 0", r"engine cannot be imported: engine/new\.py, line 31: ZeroDivisionError"),
        ("twice = None", ""),
        ("import sys, json; sys.modules['phase2.more'] = json", r"came from elsewhere.*phase2\.more"),
    ],
)
def test_code_that_does_not_load(folder: Path, run_check: Run, line: str, message: str) -> None:
    write(folder)
    with (folder / "engine/new.py").open("a") as file:
        file.write(f"\n{line}\n")
    if message:
        with pytest.raises(UserError, match=message) as error:
            run_check(folder)
        assert "\n" not in str(error.value)
    else:
        assert "TypeError: 'NoneType' object is not callable" in run_check(folder)[1]


def test_a_missing_name_fails_its_file_alone(folder: Path, course: Path, run_check: Run) -> None:
    write(folder)
    (course / "tests/phase2/test_more.py").write_text("from phase2.new import thrice\n")
    _, out = run_check(folder)
    assert "ImportError: cannot import name 'thrice'" in out
    assert "5 of 6 tests of phase 2 pass" in out


def test_the_package_is_found_in_the_folder(folder: Path) -> None:
    finder = FolderFinder("phase2", folder / "engine")
    spec = finder.find_spec("phase2")
    assert spec is not None
    assert spec.origin == str(folder / "engine/__init__.py")
    assert finder.find_spec("phase1") is None
    spec = finder.find_spec("phase2.new", [str(folder / "engine")])
    assert spec is not None
    assert spec.origin == str(folder / "engine/new.py")
    assert finder.find_spec("phase2.verify", [str(folder / "engine")]) is None  # as where phases are not tested


@pytest.mark.parametrize(
    ("number", "name", "message"),
    [
        ("2", "nothing", "holds no engine"),
        ("7", "mine", "no phase 7; the phases are 1, 2"),
        ("1", "mine", "is of phase 2"),
        ("2", "copy", r"no exercise\.json"),
        ("2", "lacking", r"lacks engine/new\.py"),
    ],
)
def test_what_cannot_be_checked(course: Path, folder: Path, number: str, name: str, message: str) -> None:
    shutil.copytree(course / "phase-2-two", course / "copy")
    shutil.copytree(folder, course / "lacking")
    (course / "lacking/engine/new.py").unlink()
    with pytest.raises(UserError, match=message):
        check.run([number, str(course / name)], course)


def test_tests_and_help_may_be_missing(course: Path, folder: Path, run_check: Run) -> None:
    with pytest.raises(UserError, match="no test was run: none has 'nothing'"):
        run_check(folder, "-k", "nothing")
    with pytest.raises(UserError, match="Wrong expression passed to '-k'"):
        run_check(folder, "-k", "a and and")
    with pytest.raises(UserError, match="help is for folders that lab start made"):
        run_check(course / "phase-2-two", "--hint")
    shutil.rmtree(course / "tests")
    with pytest.raises(UserError, match=r"no tests/phase2 here; a wheel has none"):
        run_check(folder)
    with pytest.raises(UserError, match="in a checkout of the repository"):
        check.run(["2", str(folder)], course / "tests")


@pytest.mark.parametrize(
    ("number", "name", "message"),
    [
        (2, "full", "not empty"),
        (2, "full/file", "is a file"),
        (2, "phase-2-mine", "looks like a phase"),
        (2, "phase-2-two/mine", "looks like a phase"),
        (1, "new", "phase 1 has nothing to write"),
        (3, "new", "no phase 3; the phases are 1, 2"),
    ],
)
def test_where_no_exercise_can_start(course: Path, number: int, name: str, message: str) -> None:
    (course / "full").mkdir()
    (course / "full/file").write_text("precious")
    before = sorted(course.rglob("*"))
    with pytest.raises(UserError, match=message):
        start.run([str(number), str(course / name)], course)
    assert sorted(course.rglob("*")) == before
    assert (course / "full/file").read_text() == "precious"


def test_a_hint_makes_a_function_of_a_given_file_an_exercise(course: Path) -> None:
    (course / "phase-1-one/README.md").write_text("# One\n\n## Exercise\n\n- engine/core.py, base: it is odd\n")
    work = start.start(phases(course), 1, course / "first")
    assert list(map(str, work.stubs)) == ["engine/core.py, base"]
    assert "raise NotImplementedError" in (course / "first/engine/core.py").read_text()


def test_what_a_phase_adds_beside_its_engine_is_written_too(course: Path) -> None:
    (course / "phase-2-two/training").mkdir()
    (course / "phase-2-two/training/loop.py").write_text("def train() -> int:\n    return 4\n")
    readme = course / "phase-2-two/README.md"
    readme.write_text(
        readme.read_text().replace("- engine/new.py: two", "- training/loop.py: again\n- engine/new.py: two")
    )
    work = start.start(phases(course), 2, course / "mine")
    assert "training/loop.py, train" in map(str, work.stubs)
    assert work.hints["training/loop.py"] == "again"
    assert "return 4" not in (course / "mine/training/loop.py").read_text()


def test_a_part_alone_may_be_the_exercise(course: Path) -> None:
    """Additions of other parts are given, except compiled ones, which would compute what is to be written."""
    parts = """# Two

## What changed since phase 1

    part small: doubling
    + engine/new.py       doubling
    ~ engine/__init__.py  exports
    part large: quickly
    + engine/fast.py      calls it
    + engine/fast.inl     in C++

## Exercise

- part small: doubling
"""
    (course / "phase-2-two/README.md").write_text(parts)
    (course / "phase-2-two/engine/fast.py").write_text("def fast() -> int:\n    return 4\n")
    (course / "phase-2-two/engine/fast.inl").write_text("int fast() { return 4; }\n")
    work = start.start(phases(course), 2, course / "mine")
    assert {stub.file for stub in work.stubs} == {"engine/new.py"}
    assert "return 4" in (course / "mine/engine/fast.py").read_text()
    assert not (course / "mine/engine/fast.inl").exists()
    assert "`.inl`" in (course / "mine/EXERCISE.md").read_text()
    (course / "phase-2-two/README.md").write_text(parts.replace("- part small", "- part tiny"))
    with pytest.raises(UserError, match=r"phase-2-two/README\.md: the exercise is of no part tiny"):
        start.start(phases(course), 2, course / "other")

"""The exercises of the real phases: no part of the solution is given away, and a half-right answer fails."""

from __future__ import annotations

import ast
import importlib
import json
import os
import re
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from common.lab import check, start
from common.lab.exercise import Exercise, exercise
from common.lab.snapshots import read_list
from common.phases import ROOT, Phase, phases
from tests.support import forked
from tests.support.covering import newest_engine
from tests.support.mutation import HEAVY

pytestmark = pytest.mark.usefixtures("forked_check", "_imported")


@pytest.fixture(scope="module")
def _imported() -> None:
    """Import once what the forked processes need."""
    for name in (*HEAVY, "transformers.models.auto.modeling_auto"):
        importlib.import_module(name)


@pytest.fixture(params=phases()[1:], ids=lambda phase: phase.package)
def later(request: pytest.FixtureRequest) -> Phase:
    found: Phase = request.param
    return found


Started = Callable[[Phase], tuple[Exercise, Path]]


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Started:
    """`started(phase)` returns its exercise and a fresh folder, which no test changes; made once, it takes seconds."""

    @cache
    def once(phase: Phase) -> tuple[Exercise, Path]:
        folder = tmp_path_factory.mktemp(phase.package) / "mine"
        return start.start(phases(), phase.number, folder, everything=True), folder

    return once


def test_no_body_of_the_solution_is_in_the_folder(later: Phase, started: Started) -> None:
    work, folder = started(later)
    given = [path.read_text() for path in (ROOT / "common").rglob("*.py")]
    given += [text for file, text in work.shipped.items() if text == work.sources[file]]
    known = {line.strip() for text in given for line in text.splitlines()}
    benches = [later.folder / "bench.py", *(later.folder / "benchmarks").glob("*.py")]
    known |= {line.strip() for path in benches for line in path.read_text().splitlines()}
    held = {line.strip() for path in folder.rglob("*.*") for line in path.read_text().splitlines()}
    hidden, empty = set(), {(s.file, s.name.split(".")[-1]) for s in work.stubs}
    for file in {s.file for s in work.stubs}:
        for body in ast.walk(ast.parse(work.shipped[file])):
            if isinstance(body, ast.FunctionDef) and (file, body.name) in empty:
                own = body.body[ast.get_docstring(body) is not None :]
                hidden |= {line for each in own for line in ast.unparse(each).split("\n")}
    hidden = {line.strip() for line in hidden if len(line.strip()) > 24}
    assert len(hidden) > len(work.stubs)
    shipped = Counter(line.strip() for text in work.shipped.values() for line in text.splitlines())
    left = Counter(line.strip() for text in work.sources.values() for line in text.splitlines())
    elsewhere = {line for line in hidden if left[line] < shipped[line]}  # a given function has the same line
    assert not (hidden & held) - known - elsewhere


def test_a_fresh_folder_can_be_imported(later: Phase, started: Started) -> None:
    code = "from common.lab.check_plugin import *; sys.exit(import_all('engine', Path('engine')))"
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    done = forked.run([sys.executable, "-c", code], cwd=started(later)[1], env=environment)
    assert done.returncode == 0, done.stderr


def test_hints_and_tests_name_what_is_to_be_written(later: Phase, started: Started) -> None:
    """A renamed function would lose its hint, or its tests their position."""
    work, _ = started(later)
    written = {str(s) for s in work.stubs} | {s.file for s in work.stubs}
    written |= {str(s).rpartition(".")[0] for s in work.stubs}  # classes
    assert set(work.hints) <= written
    tests = "".join(path.read_text() for path in (ROOT / f"tests/{later.package}").glob("*.py"))
    assert set(re.findall(r'mark\.about\("(.+?)"\)', tests)) <= written


@pytest.mark.parametrize("phase", phases(), ids=lambda phase: phase.package)
def test_the_core_path(phase: Phase) -> None:
    """Five to ten functions, each with a time, a hint and a test; one or more in every part of a long lesson."""
    work = exercise(phases(), phase.number)
    assert 5 <= len(work.minutes) <= 10
    covered = set(map(str, work.stubs)) | {str(stub).rpartition(".")[0] for stub in work.stubs}
    assert set(work.minutes) <= covered
    tests = "".join(path.read_text() for path in (ROOT / f"tests/{phase.package}").glob("*.py"))
    about = set(re.findall(r'mark\.about\("(.+?)"\)', tests))
    for stub in work.stubs:
        assert work.hint(stub)
        assert work.time(stub)
        assert str(stub) in about, f"no test of phase {phase.number} is about {stub}"
        assert stub.purpose
    listing = read_list(phase)
    if phase.number in (3, 5, 6, 7):  # long lessons
        part_of = {change.path: change.part for change in listing.changes}
        assert {part_of[stub.file] for stub in work.stubs} == set(listing.parts)


def real_check(capsys: pytest.CaptureFixture[str], folder: Path, *options: str, number: int = 2) -> tuple[int, str]:
    capsys.readouterr()
    return check.run([str(number), str(folder), *options]), capsys.readouterr().out


@pytest.mark.parametrize("number", [3, *(pytest.param(number, marks=pytest.mark.slow) for number in (2, 4, 5))])
def test_the_check_of_a_fresh_folder_names_what_to_write_first(
    number: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No test calls the engine while its file is collected, because nothing is written yet."""
    first = start.start(phases(), number, tmp_path / "mine", everything=True).stubs[0]
    about = f'mark.about("{first}")'
    files = [path for path in sorted((ROOT / f"tests/phase{number}").glob("*.py")) if about in path.read_text()]
    few = ("-k", " or ".join(file.stem for file in files))  # of all files that are collected
    status, out = real_check(capsys, tmp_path / "mine", "--hint", *few, number=number)
    assert status == 1
    assert f"Write next: {first}()" in out
    assert f"Hint for {first.file}" in out


RULE = ("-k", "test_exercise and not loop and not tools")
SHIPPED = phases()[1].folder / "engine/verify.py"


def test_the_rule_alone_gives_partial_credit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    start.start(phases(), 2, tmp_path / "mine", everything=True)
    shutil.copy(SHIPPED, tmp_path / "mine/engine")
    status, out = real_check(capsys, tmp_path / "mine", *RULE)
    assert status == 1
    match = re.search(r"(\d+) of (\d+) tests of phase 2 pass", out)
    assert match
    assert 0 < int(match[1]) < int(match[2])
    assert "Write next: engine/drafting.py, ModelDrafter" in out


WRONG = {
    "upside down": ("(target_of / draft_probs.gather(-1, draft_tokens[..., None])[..., 0])",
                    "(draft_probs.gather(-1, draft_tokens[..., None])[..., 0] / target_of)"),
    "residual not normalised": ("residual / mass", "residual"),
    "residual not clipped": (".clamp(min=0)", ".abs()"),
    "counts tokens after the first rejected one": (".cumprod(dim=1)", ""),
    "widths ignored": (" & (columns < widths[:, None])", ""),
    "division by zero": ("torch.where(mass > 0, residual / mass, following[cut])", "residual / mass"),
}  # fmt: skip


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] if i else []) for i, n in enumerate(WRONG)])
def test_a_wrong_rule_does_not_pass(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    start.start(phases(), 2, tmp_path / "mine", everything=True)
    old, new = WRONG[name]
    text = SHIPPED.read_text()
    assert old in text
    (tmp_path / "mine/engine/verify.py").write_text(text.replace(old, new))
    status, out = real_check(capsys, tmp_path / "mine", *RULE)
    assert status == 1
    assert re.search(r"First wrong: .*, in engine/verify.py, verify\(\)\n", out)
    assert re.search(r"draft_tokens \[\[.*\n  expected  \[.*\n  got       \[", out, re.DOTALL)


@pytest.mark.slow
def test_a_shipped_phase_passes_its_own_check(later: Phase, capsys: pytest.CaptureFixture[str]) -> None:
    status, out = real_check(capsys, later.folder, number=later.number)
    assert status == 0
    assert re.search(r"^(\d+) of \1 tests of phase \d pass$", out, re.MULTILINE)


@pytest.mark.slow
def test_a_fresh_folder_of_a_phase_passes_nothing(
    later: Phase, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A test that passes on a fresh folder is about given code: mark it `no_exercise`."""
    if later.number > newest_engine():
        pytest.skip("its engine is given, and many of its tests are about what the engine does")
    work = start.start(phases(), later.number, tmp_path / "mine", everything=True)
    status, out = real_check(capsys, tmp_path / "mine", number=later.number)
    assert status == 1
    assert re.search(r"^0 of \d+ tests of phase \d pass$", out, re.MULTILINE), out
    assert f"Write next: {work.stubs[0].file}" in out
    assert json.loads((tmp_path / "mine/exercise.json").read_text()) == {
        "phase": later.number,
        "all": True,
        "part": None,
        "helped": {},
    }


@pytest.mark.slow
@pytest.mark.parametrize("phase", phases(), ids=lambda phase: phase.package)
def test_a_stub_of_the_core_path_passes_none_of_its_tests(
    phase: Phase, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    work = start.start(phases(), phase.number, tmp_path / "mine")
    of_functions = ["-m", "about and not slow and not gpu"]  # the other tests of a late phase take minutes
    results = check.run_tests(work, tmp_path / "mine", ROOT, of_functions)
    for stub in work.stubs:
        outcomes = [result.outcome for result in results if result.about == str(stub) and result.outcome != "skipped"]
        assert outcomes, stub
        assert "passes" not in outcomes, stub

"""`lab drift`: its findings and remedies, and the READMEs that --fix writes; on small scratch repositories."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from common.errors import UserError
from common.lab import drift
from common.lab.compare import compare
from common.lab.snapshots import files
from common.phases import ROOT, phases

LOOP = '''"""The loop."""

import os

LIMIT = 1


class Loop:
    """Goes round."""

    speed = 1

    def go(self) -> int:
        return 1


def start() -> None:
    """Begins."""
'''
README = """# Phase 2

**Why?**

## What changed since phase 1

What is new:

    + engine/verify.py  the rule
    ~ engine/loop.py    goes round faster
        Loop.go
    - engine/old.py     not needed any more

Words below the list.

## Exercise

    python generate.py
"""
NOTEBOOK = {"cells": [{"cell_type": "code", "source": ["1"], "outputs": [], "execution_count": None}], "nbformat": 4}


def write(root: Path, contents: dict[str, str]) -> None:
    for name, text in contents.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Make two phases whose README is right."""
    same = {"engine/__init__.py": "", "engine/same.py": "def same() -> int:\n    return 1\n", "config.yaml": "k: 4\n"}
    first = {**same, "README.md": "# Phase 1\n", "bench.py": "1\n", "results/a.csv": "1\n", "lesson.ipynb": "{}"}
    second = {**first, "README.md": README, "bench.py": "2\n", "results/b.csv": "2\n", "lesson.ipynb": '{"cells": []}'}
    first |= {"engine/loop.py": LOOP, "engine/old.py": "", "lesson.ipynb": json.dumps(NOTEBOOK)}
    second |= {"engine/loop.py": LOOP.replace("return 1", "return 2"), "engine/verify.py": '"""The rule, alone."""\n'}
    write(tmp_path / "phase-1-one", first)
    write(tmp_path / "phase-2-two", second)
    return tmp_path


@pytest.fixture
def lab_drift(root: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    def run(*arguments: str) -> tuple[int, str]:
        status = drift.run(list(arguments), root)
        return status, capsys.readouterr().out

    return run


def edit(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


def test_this_repository_has_not_drifted(capsys: pytest.CaptureFixture[str]) -> None:
    assert drift.run([], ROOT) == 0, capsys.readouterr().out


def test_a_true_list_passes_with_one_line(lab_drift: Callable[..., tuple[int, str]]) -> None:
    status, out = lab_drift()
    assert status == 0
    assert out.count("\n") == 1


LOOP_ENTRY = "    ~ engine/loop.py    goes round faster\n        Loop.go\n"
LISTED = "phase-2-two/README.md: "
EDITS: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "a character in an unlisted file": (
        lambda root: edit(root / "phase-2-two/engine/same.py", "return 1", "return 2"),
        "phase-2-two/engine/same.py: differs from phase 1's from line 2 on, and phase-2-two/README.md does not list it",
        drift.UNDO,
    ),
    "a fix that was not ported": (
        lambda root: edit(root / "phase-1-one/config.yaml", "4", "5"),
        "phase-2-two/config.yaml: differs from phase 1's from line 1 on, and phase-2-two/README.md does not list it",
        drift.UNDO,
    ),
    "a line more at the end": (
        lambda root: edit(root / "phase-2-two/config.yaml", "4\n", "4\n\n"),
        "phase-2-two/config.yaml: differs from phase 1's from line 3 on, and phase-2-two/README.md does not list it",
        drift.UNDO,
    ),
    "a new file": (
        lambda root: write(root, {"phase-2-two/engine/more.py": "x = 1\n"}),
        "phase-2-two/engine/more.py: is not in phase 1, and phase-2-two/README.md does not list it",
        drift.UNDO,
    ),
    "a file less": (
        lambda root: (root / "phase-2-two/engine/same.py").unlink(),
        "phase-2-two/engine/same.py: is missing; phase 1 has it, and phase-2-two/README.md does not list it",
        drift.UNDO,
    ),
    "a listed file that is not there": (
        lambda root: (root / "phase-2-two/engine/verify.py").unlink(),
        LISTED + "lists engine/verify.py, in which phases 1 and 2 do not differ",
        drift.RELIST,
    ),
    "a changed file listed as new": (
        lambda root: edit(root / "phase-2-two/README.md", LOOP_ENTRY, "    + engine/loop.py\n"),
        LISTED + "lists engine/loop.py with `+`, and `~` is right",
        "`lab drift --fix` sets it",
    ),
    "a definition that is not named": (
        lambda root: edit(root / "phase-2-two/engine/loop.py", "speed = 1", "speed = 2"),
        "phase-2-two/engine/loop.py: Loop differs from phase 1's, and phase-2-two/README.md does not name it",
        drift.UNDO,
    ),
    "a name too many": (
        lambda root: edit(root / "phase-2-two/README.md", "Loop.go", "Loop.go, start"),
        LISTED + "names start under engine/loop.py, in which it does not differ",
        drift.RELIST,
    ),
    "no section": (
        lambda root: write(root, {"phase-2-two/README.md": "# Phase 2\n"}),
        LISTED + "the section `## What changed since phase 1` is missing",
        "`lab drift --fix` writes it",
    ),
    "a section without a list": (
        lambda root: write(root, {"phase-2-two/README.md": "## What changed since phase 1\n\nMuch.\n"}),
        "phase-2-two/engine/verify.py: is not in phase 1, and phase-2-two/README.md does not list it",
        drift.UNDO,
    ),
}


@pytest.mark.parametrize("what", EDITS)
def test_drift_is_found_and_fixed(what: str, root: Path, lab_drift: Callable[..., tuple[int, str]]) -> None:
    change, message, remedy = EDITS[what]
    change(root)
    status, out = lab_drift()
    assert status == 1
    assert message in out.splitlines()
    assert f"  what to do: {remedy}" in out.splitlines()
    status, out = lab_drift("--fix")
    assert (status, out.splitlines()[0][:38]) == (0, "rewrote the list in phase-2-two/README")
    assert lab_drift("--fix")[1].count("\n") == 1, "a second --fix changes nothing"


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "no line of a list": (
        lambda root: edit(root / "phase-2-two/README.md", "- engine/old.py     not", "* engine/old.py     not"),
        "phase-2-two/README.md, line 12: '* engine/old.py     not needed any more' is no line of the list",
    ),
    "names under a new file": (
        lambda root: edit(root / "phase-2-two/README.md", "the rule\n", "the rule\n        verify\n"),
        "phase-2-two/README.md, line 10: 'verify' is no line of the list",
    ),
    "twice": (
        lambda root: edit(root / "phase-2-two/README.md", "engine/old.py ", "engine/verify.py "),
        "phase-2-two/README.md, line 12: engine/verify.py is listed twice; leave one line",
    ),
    "not Python": (
        lambda root: edit(root / "phase-2-two/engine/loop.py", "return 2", "return ("),
        "loop.py, line 14: not valid Python",
    ),
    "no README": (
        lambda root: (root / "phase-2-two/README.md").unlink(),
        "phase-2-two/README.md is missing",
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_what_cannot_be_read_is_for_hands(what: str, root: Path, lab_drift: Callable[..., tuple[int, str]]) -> None:
    change, message = BROKEN[what]
    change(root)
    status, out = lab_drift()
    assert status == 1
    assert message in out
    assert drift.BY_HAND in out
    before = {name: (root / name).read_bytes() for name in files(root)}
    with pytest.raises(UserError):
        lab_drift("--fix")
    assert before == {name: (root / name).read_bytes() for name in files(root)}


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("return 2", "return 2  # words"),
        ("import os", "import sys"),
        ('"""The loop."""', '"""Round."""'),
        ("speed = 1", "speed=1"),
    ],
)
def test_comments_layout_and_imports_need_no_names(
    root: Path, lab_drift: Callable[..., tuple[int, str]], old: str, new: str
) -> None:
    edit(root / "phase-2-two/engine/loop.py", old, new)
    assert lab_drift()[0] == 0


def test_fix_keeps_order_and_words_and_touches_nothing_else(
    root: Path, lab_drift: Callable[..., tuple[int, str]]
) -> None:
    write(root, {"phase-2-two/engine/added.py": '"""What it adds.\n\nMore."""\n', "phase-2-two/data.txt": "x\n"})
    write(root, {"phase-1-one/engine/old.py": "1\n", "phase-2-two/engine/old.py": "2\n"})
    (root / "phase-2-two/engine/same.py").unlink()
    edit(root / "phase-2-two/engine/loop.py", "def start()", "def finish()")
    assert lab_drift("--fix")[0] == 0
    expected = """\
    + engine/verify.py  the rule
    + data.txt          TODO
    + engine/added.py   What it adds
    ~ engine/loop.py    goes round faster
        Loop.go, finish, start
    ~ engine/old.py     not needed any more
        module
    - engine/same.py    TODO
"""
    before, _, rest = README.partition("    + engine/verify.py")
    after = rest[rest.index("\nWords below") :]
    assert (root / "phase-2-two/README.md").read_text() == before + expected + after


def test_a_folder_that_goes_as_a_whole_has_one_line(root: Path, lab_drift: Callable[..., tuple[int, str]]) -> None:
    write(root, {"phase-1-one/ladder/__init__.py": "", "phase-1-one/ladder/cpp/rung.cpp": ""})
    status, out = lab_drift()
    assert status == 1
    assert "phase-2-two/ladder/: is missing; phase 1 has it, and phase-2-two/README.md does not list it" in out
    assert lab_drift("--fix")[0] == 0
    edit(root / "phase-2-two/README.md", "- ladder/           TODO", "- ladder/           taught before")
    assert lab_drift()[0] == 0
    old, new = phases(root)
    diffs = compare(old, new)
    assert [diff.change.words for diff in diffs if diff.change.path.startswith("ladder/")] == ["taught before"] * 2
    write(root, {"phase-2-two/ladder/__init__.py": ""})
    assert "phase-2-two/ladder/cpp/rung.cpp: is missing" in lab_drift()[1]


def test_fix_keeps_the_parts(root: Path, lab_drift: Callable[..., tuple[int, str]]) -> None:
    listing = """\
    part cpu: on every machine
    + engine/verify.py  the rule
    ~ engine/loop.py    goes round faster
        Loop.go

    part gpu
    + engine/card.py  on a card
    - engine/old.py     not needed any more
"""
    before, _, rest = README.partition("    + engine/verify.py")
    readme = root / "phase-2-two/README.md"
    readme.write_text(before + listing + rest[rest.index("\nWords below") :])
    write(root, {"phase-2-two/engine/card.py": "", "phase-2-two/engine/more.py": '"""More."""\n'})
    assert lab_drift("--fix")[0] == 0
    fixed = listing.replace("old.py     not", "old.py   not").replace(
        "    - engine/old", "    + engine/more.py  More\n    - engine/old"
    )
    assert readme.read_text() == before + fixed + rest[rest.index("\nWords below") :]


def test_a_phase_that_begins_as_a_copy_gets_an_empty_list(
    root: Path, lab_drift: Callable[..., tuple[int, str]]
) -> None:
    shutil.copytree(root / "phase-2-two", root / "phase-3-three")
    status, out = lab_drift()
    assert status == 1
    assert "phase-3-three/README.md: the section `## What changed since phase 2` is missing" in out
    assert lab_drift("--fix")[0] == 0
    readme = (root / "phase-3-three/README.md").read_text()
    assert "## What changed since phase 2\n\nWhat is new:\n" in readme
    assert "engine/" not in readme
    write(root, {"phase-3-three/engine/next.py": '"""What comes next."""\n'})
    assert lab_drift("--fix")[0] == 0
    assert "    + engine/next.py  What comes next\n" in (root / "phase-3-three/README.md").read_text()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("notes.md", b"good\nbad \nbad\t\n", "notes.md: line 2 ends with a space or tab"),
        ("notes.md", b"good\n\nbad\r\n", "notes.md: line 3 ends with CRLF"),
        ("a.ipynb", json.dumps({"cells": [{}, {"outputs": [{}]}]}).encode(), "a.ipynb: cell 2 holds an output"),
        ("a.ipynb", json.dumps({"cells": [{"execution_count": 1}]}).encode(), "a.ipynb: cell 1 holds an output"),
        ("a.ipynb", b"{", "a.ipynb: is no notebook"),
        ("a.png", b"\0 \n \r\n", None),
    ],
)
def test_text_that_makes_differences_unreadable_is_refused(
    root: Path, lab_drift: Callable[..., tuple[int, str]], name: str, content: bytes, message: str | None
) -> None:
    (root / name).write_bytes(content)
    status, out = lab_drift()
    assert status == (1 if message else 0)
    assert message is None or message in out
    assert (root / name).read_bytes() == content


def test_what_git_ignores_does_not_count(root: Path, lab_drift: Callable[..., tuple[int, str]]) -> None:
    subprocess.run(["git", "init", "-q", str(root)], check=True)
    write(root, {".gitignore": "*.tmp\n", "phase-2-two/a.tmp": "bad \n"})
    assert lab_drift()[0] == 0
    write(root, {"phase-2-two/not-added.py": ""})
    assert "phase-2-two/not-added.py: is not in phase 1" in lab_drift()[1]


def test_without_phases_it_says_where_to_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="in a checkout of the repository"):
        drift.run([], tmp_path)

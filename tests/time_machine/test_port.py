"""`lab port` on scratch repositories of three small phases, and once on a clone of this one."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

from common.errors import UserError
from common.lab.cli import main
from common.phases import phases

ONE, TWO, THREE = "phase-1-first", "phase-2-second", "phase-3-third"
AMEND = "git commit --amend --no-edit"


def test_a_fix_reaches_unchanged_and_changed_files(scratch: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    scratch.commit("Lesson 3", {f"{THREE}/engine/code.py": scratch.text({2: "lesson"})})
    scratch.commit("Fix", {f"{ONE}/engine/code.py": scratch.text({9: "fixed"}), "tests/test_code.py": "assert True\n"})
    monkeypatch.chdir(scratch.folder / TWO / "engine")
    status, out = scratch.port()
    assert status == 0
    assert scratch.read(f"{TWO}/engine/code.py") == scratch.text({9: "fixed"})
    assert scratch.read(f"{THREE}/engine/code.py") == scratch.text({2: "lesson", 9: "fixed"})
    assert scratch.status() == f"M  {TWO}/engine/code.py\nM  {THREE}/engine/code.py\n"
    assert AMEND in out
    scratch.git(*AMEND.split()[1:])
    assert scratch.status() == ""
    assert not scratch.under_way


def test_a_conflict_stops_is_resolved_once_and_goes_on(scratch: Any) -> None:
    lesson = scratch.text({9: "lesson"})
    scratch.commit("Lesson 2", {f"{TWO}/engine/code.py": lesson, f"{THREE}/engine/code.py": lesson})
    scratch.commit("Fix", {f"{ONE}/engine/code.py": scratch.text({9: "fixed"})})
    status, out = scratch.port()
    assert status == 1
    for words in (f"{TWO}/engine/code.py: CONFLICT", "lab port --continue", "lab port --abort"):
        assert words in out
    marked = [f"<<<<<<< {TWO}", "lesson", f"||||||| {ONE} before the fix", "line 9", "=======", "fixed"]
    assert scratch.read(f"{TWO}/engine/code.py") == scratch.text(
        {9: "\n".join([*marked, f">>>>>>> {ONE} after the fix"])}
    )
    assert scratch.status() == f"UU {TWO}/engine/code.py\n", "git itself refuses to commit this"

    with pytest.raises(UserError, match=f"{TWO}/engine/code.py still has conflict markers"):
        scratch.port("--continue")
    with pytest.raises(UserError, match=r"a port is under way: .*--continue.*--abort"):
        scratch.port()
    scratch.write({f"{TWO}/engine/code.py": scratch.text({9: "fixed lesson"})})
    status, out = scratch.port("--continue")
    assert status == 0
    assert AMEND in out
    assert scratch.read(f"{THREE}/engine/code.py") == scratch.text({9: "fixed lesson"})
    assert scratch.status() == f"M  {TWO}/engine/code.py\nM  {THREE}/engine/code.py\n"
    assert not scratch.under_way


def test_a_phase_may_keep_its_own_and_the_next_one_then_does(scratch: Any) -> None:
    lesson = scratch.text({9: "lesson"})
    scratch.commit("Lesson 2", {f"{TWO}/engine/code.py": lesson, f"{THREE}/engine/code.py": lesson})
    scratch.commit("Fix", {f"{ONE}/engine/code.py": scratch.text({9: "fixed"})})
    assert scratch.port()[0] == 1
    scratch.write({f"{TWO}/engine/code.py": lesson})
    status, out = scratch.port("--continue")
    assert status == 0
    assert out.splitlines()[-1].startswith("nothing to carry")
    assert scratch.status() == ""


def test_each_phase_can_conflict_in_its_turn(scratch: Any) -> None:
    for phase, line in ((TWO, "second"), (THREE, "third")):
        scratch.commit("Lesson", {f"{phase}/engine/code.py": scratch.text({9: line})})
    scratch.commit("Fix", {f"{ONE}/engine/code.py": scratch.text({9: "fixed"})})
    assert scratch.port()[0] == 1
    scratch.write({f"{TWO}/engine/code.py": scratch.text({9: "fixed second"})})
    status, out = scratch.port("--continue")
    assert status == 1
    assert f"{THREE}/engine/code.py: CONFLICT" in out
    assert f">>>>>>> {TWO} after the fix" in scratch.read(f"{THREE}/engine/code.py"), "the nearest phase that has it"
    scratch.write({f"{THREE}/engine/code.py": scratch.text({9: "fixed third"})})
    assert scratch.port("--continue")[0] == 0
    assert scratch.read(f"{TWO}/engine/code.py") == scratch.text({9: "fixed second"})


def test_what_is_edited_during_a_stop_is_kept_and_carried_on(scratch: Any) -> None:
    names = [f"{phase}/engine/{name}.py" for phase in (TWO, THREE) for name in ("a", "code")]
    both = dict.fromkeys([f"{ONE}/engine/a.py", *names], scratch.text())
    scratch.commit("Lesson", both | {f"{TWO}/engine/code.py": scratch.text({9: "lesson"})})
    scratch.commit(
        "Fix", {f"{ONE}/engine/a.py": scratch.text({1: "fixed"}), f"{ONE}/engine/code.py": scratch.text({9: "fixed"})}
    )
    assert scratch.port()[0] == 1
    scratch.write({f"{TWO}/engine/a.py": scratch.text({1: "fixed by hand"}), f"{TWO}/engine/code.py": None})
    assert scratch.port("--continue")[0] == 0
    assert scratch.read(f"{THREE}/engine/a.py") == scratch.text({1: "fixed by hand"})
    assert not (scratch.folder / TWO / "engine/code.py").exists()


def test_abort_puts_everything_back(scratch: Any) -> None:
    scratch.commit("Old", {f"{phase}/engine/old.py": "old\n" for phase in (ONE, TWO, THREE)})
    scratch.commit("Lesson 3", {f"{THREE}/engine/code.py": scratch.text({9: "lesson"})})
    fix = {"engine/code.py": scratch.text({9: "fixed"}), "engine/added/new.py": "new\n", "engine/old.py": None}
    scratch.commit("Fix", {f"{ONE}/{path}": content for path, content in fix.items()})
    before = {path: path.read_bytes() for path in scratch.folder.glob("phase-*/**/*") if path.is_file()}
    assert scratch.port()[0] == 1
    assert (scratch.folder / TWO / "engine/added/new.py").exists()
    assert not (scratch.folder / TWO / "engine/old.py").exists()
    assert scratch.port("--abort")[0] == 0
    assert scratch.status() == ""
    assert {path: path.read_bytes() for path in scratch.folder.glob("phase-*/**/*") if path.is_file()} == before
    assert not scratch.under_way
    for option in ("--abort", "--continue"):
        with pytest.raises(UserError, match="no port is under way"):
            scratch.port(option)

    assert scratch.port()[0] == 1, "and it can begin again"
    scratch.write({f"{THREE}/engine/code.py": scratch.text({9: "fixed lesson"})})
    assert scratch.port("--continue")[0] == 0
    changes = ["A  {}/engine/added/new.py", "M  {}/engine/code.py", "D  {}/engine/old.py"]
    assert scratch.status().splitlines() == [change.format(phase) for phase in (TWO, THREE) for change in changes]


def test_a_change_follows_a_renamed_file(scratch: Any) -> None:
    for phase, path in ((TWO, "sub/other.py"), (THREE, "third.py")):
        renamed = {f"{phase}/engine/code.py": None, f"{phase}/engine/{path}": scratch.text({2: "lesson"})}
        scratch.commit("Lesson", renamed)
    scratch.commit("Fix", {f"{ONE}/engine/code.py": scratch.text({9: "fixed"})})
    status, out = scratch.port()
    assert status == 0
    assert f"{TWO}/engine/sub/other.py: carried (it was engine/code.py)" in out
    assert scratch.read(f"{TWO}/engine/sub/other.py") == scratch.text({2: "lesson", 9: "fixed"})
    assert f"{THREE}/engine/third.py: carried (it was engine/sub/other.py)" in out
    assert scratch.read(f"{THREE}/engine/third.py") == scratch.text({2: "lesson", 9: "fixed"})
    assert scratch.status() == f"M  {TWO}/engine/sub/other.py\nM  {THREE}/engine/third.py\n"


def test_a_phase_without_the_file_is_skipped(scratch: Any) -> None:
    scratch.commit("Lesson 2", {f"{TWO}/engine/code.py": None, f"{TWO}/engine/other.py": "something else\n"})
    scratch.commit("Fix", {f"{ONE}/engine/code.py": scratch.text({9: "fixed"})})
    status, out = scratch.port()
    assert status == 0
    assert f"{TWO}/engine/code.py: not in this phase, skipped" in out
    assert not (scratch.folder / TWO / "engine/code.py").exists()
    assert scratch.read(f"{THREE}/engine/code.py") == scratch.text({9: "fixed"})


def test_an_added_file_is_added(scratch: Any) -> None:
    scratch.commit("Lesson 3", {f"{THREE}/engine/new.py": "the lesson's own\n"})
    scratch.commit("Fix", {f"{ONE}/engine/new.py": "new\n"})
    status, out = scratch.port()
    assert scratch.read(f"{TWO}/engine/new.py") == "new\n"
    assert status == 1
    assert f"{THREE}/engine/new.py: CONFLICT" in out
    assert "the lesson's own\n" in scratch.read(f"{THREE}/engine/new.py")


def test_a_deleted_file_is_deleted_where_it_was_the_same(scratch: Any) -> None:
    scratch.commit("Lesson 2", {f"{TWO}/engine/code.py": scratch.text({2: "lesson"})})
    scratch.commit("Fix", {f"{ONE}/engine/code.py": None})
    status, out = scratch.port()
    assert status == 0
    assert scratch.status() == f"D  {THREE}/engine/code.py\n"
    assert f"{TWO}/engine/code.py: kept" in out


def test_bytes_and_modes_stay_what_they_are(scratch: Any) -> None:
    old, new, odd = b"\0\xff\r\nold", b"\0\xff\r\nnew", "engine/name with \u00e4, space.bin"
    for phase in (ONE, TWO, THREE):
        scratch.write({f"{phase}/{odd}": old, f"{phase}/engine/run.sh": scratch.text()})
    scratch.commit("Binary", {f"{THREE}/engine/run.sh": scratch.text({2: "lesson"})})
    (scratch.folder / ONE / "engine/run.sh").chmod(0o755)
    scratch.commit("Fix", {f"{ONE}/{odd}": new, f"{ONE}/engine/run.sh": scratch.text({9: "fixed"})})
    assert scratch.port()[0] == 0
    for phase in (TWO, THREE):
        assert (scratch.folder / phase / odd).read_bytes() == new
        assert (scratch.folder / phase / "engine/run.sh").stat().st_mode & 0o111
    assert scratch.read(f"{THREE}/engine/run.sh") == scratch.text({2: "lesson", 9: "fixed"})


def test_a_binary_file_that_differs_is_for_a_person(scratch: Any) -> None:
    table = "engine/table.bin"
    scratch.commit("Binary", {f"{phase}/{table}": b"\0" + phase.encode() for phase in (ONE, TWO, THREE)})
    scratch.commit("One of them is right", {f"{ONE}/engine/a.bin": b"\0old", f"{THREE}/engine/a.bin": b"\0new"})
    scratch.commit("Fix", {f"{ONE}/{table}": b"\0fixed", f"{ONE}/engine/a.bin": b"\0new"})
    status, out = scratch.port()
    assert status == 1
    assert "is binary and cannot be merged" in out
    assert (scratch.folder / TWO / table).read_bytes() == b"\0" + TWO.encode()
    scratch.write({f"{TWO}/{table}": b"\0fixed second"})
    assert scratch.port("--continue")[0] == 1, "phase 3 has its own as well"
    assert scratch.port("--continue")[0] == 0, "this time the phase's own is right"
    assert scratch.status() == f"M  {TWO}/{table}\n"


def test_a_phases_own_files_are_not_carried(scratch: Any) -> None:
    own = ["README.md", "bench.py", "lesson.ipynb", "results/results.json"]
    carried = ["config.yaml", "engine/README.md", "generate.py"]
    every = [f"{phase}/{name}" for phase in (ONE, TWO, THREE) for name in own + carried]
    scratch.commit("Files", dict.fromkeys(every, "old\n"))
    fix = {f"{ONE}/{name}": "new\n" for name in own + carried} | {f"{TWO}/README.md": "its list is new as well\n"}
    scratch.commit("Fix", fix)
    status, out = scratch.port()
    assert status == 0
    left = [f"{ONE}/{name}" for name in own] + [f"{TWO}/README.md"]
    assert f"not carried, because every phase has its own: {', '.join(left)}" in out
    assert scratch.status() == "".join(f"M  {phase}/{name}\n" for phase in (TWO, THREE) for name in carried)


def test_a_change_that_is_there_already_is_not_carried_twice(scratch: Any) -> None:
    fix = scratch.commit("Fix", {f"{ONE}/engine/code.py": scratch.text({9: "fixed"})})
    scratch.commit("By hand", {f"{TWO}/engine/code.py": scratch.text({2: "lesson", 9: "fixed"})})
    status, out = scratch.port(fix)
    assert status == 0
    assert f"{TWO}/engine/code.py: has the change already" in out
    assert scratch.status() == f"M  {THREE}/engine/code.py\n"
    scratch.commit("Carry")
    status, out = scratch.port(fix)
    assert status == 0
    assert out.splitlines()[-1].startswith("nothing to carry")
    assert scratch.status() == ""


def test_the_next_command_depends_on_where_the_fix_is(scratch: Any) -> None:
    fix = scratch.commit("Fix", {f"{ONE}/engine/code.py": scratch.text({9: "fixed"})})
    carry = f'git commit -m "Carry {fix[:10]} forward"'
    scratch.git("update-ref", "refs/remotes/origin/main", "HEAD")
    assert f"{carry}    a commit of its own, because the fix is pushed already" in scratch.port()[1]
    scratch.git("reset", "--quiet", "--hard")
    scratch.git("update-ref", "-d", "refs/remotes/origin/main")
    scratch.commit("Something else", {"notes.md": "notes\n"})
    assert f"{carry}    a commit of its own, because the fix is not the last commit" in scratch.port("HEAD^")[1]


def test_a_fix_of_the_last_phase_goes_nowhere(scratch: Any) -> None:
    scratch.commit("Fix", {f"{THREE}/engine/code.py": scratch.text({9: "fixed"})})
    assert scratch.port() == (0, f"nothing to carry: {THREE} is the last phase\n")


def test_a_seeded_bug_is_fixed_in_every_phase_of_this_repository(clone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=clone, capture_output=True, text=True, check=True).stdout

    monkeypatch.chdir(clone)
    first, *later = (phase.folder for phase in phases(clone))
    shared = sorted(
        file.relative_to(first)
        for file in first.glob("engine/*.py")
        if all((other / "engine" / file.name).read_bytes() == file.read_bytes() for other in later)
    )
    path = shared[0]
    good = (first / path).read_text(encoding="utf-8")
    middle = len(good) // 2
    for folder in (first, *later):
        (folder / path).write_text(good[:middle] + "a bug" + good[middle:], encoding="utf-8")
    git("commit", "--quiet", "--all", "--message", "A bug")
    (first / path).write_text(good, encoding="utf-8")
    git("commit", "--quiet", "--all", "--message", "Fix")
    assert main(["port"]) == 0
    git(*AMEND.split()[1:])
    assert all((folder / path).read_text(encoding="utf-8") == good for folder in later)
    assert git("diff", "--stat", "HEAD~2") == "", "everything is byte for byte as it was before the bug"
    assert git("log", "--format=%s") == "Fix\nA bug\nEverything\n"

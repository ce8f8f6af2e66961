"""Refusals of `lab port`, in one line each: changed trees, commits that are not a fix, folders without git."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from common.errors import UserError
from common.lab.cli import main

ONE, TWO, THREE = "phase-1-first", "phase-2-second", "phase-3-third"


def test_untracked_files_outside_the_phases_do_not_matter(scratch: Any) -> None:
    scratch.commit("Fix", {f"{ONE}/engine/code.py": scratch.text({9: "fixed"})})
    scratch.write({"my-phase-2/engine/code.py": "an exercise\n"})
    assert scratch.port()[0] == 0


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({f"{ONE}/engine/code.py": "edited"}, f"{ONE}/engine/code.py not committed: commit first, or .*git stash -u"),
        ({f"{TWO}/engine/new.py": "untracked"}, f"{TWO}/engine/new.py not committed"),
        ({f"{TWO}/engine/code.py": "edited", "a.md": "new"}, f"{TWO}/engine/code.py not committed"),
    ],
)
def test_a_dirty_tree_is_refused(scratch: Any, files: dict[str, str], message: str) -> None:
    scratch.commit("Fix", {f"{ONE}/engine/code.py": scratch.text({9: "fixed"})})
    scratch.write(files)
    before = scratch.status()
    with pytest.raises(UserError, match=message):
        scratch.port()
    assert scratch.status() == before
    assert not scratch.under_way


def test_commits_that_are_no_fix_are_refused(scratch: Any) -> None:
    start = scratch.git("rev-parse", "HEAD").strip()
    outside = scratch.commit("Outside", {"README.md": "text\n", "phase-1-first.md": "text\n"})
    own = scratch.commit("Own", {f"{phase}/README.md": "text\n" for phase in (ONE, TWO)})
    several = scratch.commit("Several", {f"{phase}/engine/code.py": scratch.text({9: "fixed"}) for phase in (ONE, TWO)})
    scratch.git("checkout", "--quiet", "-b", "side", start)
    side = scratch.commit("Side", {f"{ONE}/engine/side.py": "side\n"})
    scratch.git("checkout", "--quiet", "-")
    for arguments, message in (
        ([outside], "touches no phase: name a commit that"),
        ([own], f"changes only what every phase has of its own .{ONE}/README.md, "),
        ([several], rf"touches several phases \({ONE}, {TWO}\): commit the fix in the first of them alone"),
        ([], "touches several phases"),
        ([start], "touches several phases"),
        ([side], "is not in the history of HEAD: .*git cherry-pick"),
        (["no-such"], "there is no commit 'no-such' here"),
        (["--", "--help"], "there is no commit '--help' here"),
        ([several, "--continue"], "take no COMMIT"),
        (["--abort", "--continue"], "not allowed with"),
    ):
        with pytest.raises(UserError, match=message) as error:
            scratch.port(*arguments)
        assert "\n" not in str(error.value)
    scratch.git("merge", "--quiet", "--no-edit", "side")
    with pytest.raises(UserError, match="is a merge: name the commit in it that has the fix"):
        scratch.port()
    assert scratch.status() == ""
    assert not scratch.under_way


def test_an_interrupted_port_can_only_be_undone(scratch: Any) -> None:
    fix = scratch.commit("Fix", {f"{ONE}/engine/code.py": scratch.text({9: "fixed"})})
    state = {"commit": fix, "head": fix, "touched": [f"{TWO}/engine/code.py"], "conflict": None}
    (scratch.folder / ".git/lab-port.json").write_text(json.dumps(state))
    with pytest.raises(UserError, match=r"interrupted .*--abort"):
        scratch.port("--continue")
    assert scratch.port("--abort")[0] == 0
    assert scratch.port()[0] == 0


def test_without_a_repository_or_git(tmp_path: Path, plain_git: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"is in no git work tree .*; run this inside a clone of the lab"):
        main(["port"])
    subprocess.run(["git", "init", "--quiet"], check=True)
    with pytest.raises(UserError, match="there is no commit 'HEAD' here"):
        main(["port"])
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match="git is not installed"):
        main(["port"])

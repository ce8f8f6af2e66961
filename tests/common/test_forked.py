"""A forked program behaves as one that Python starts."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from tests.support import forked

PROGRAM = """
import os, sys, torch
import common.errors
print(os.getcwd(), sys.argv, os.environ.get("MINE"), __name__, sys.dont_write_bytecode)
common.errors.changed = True
print("an error", file=sys.stderr)
sys.exit(3)
"""


def test_output_status_folder_and_environment(tmp_path: Path) -> None:
    for no_bytecode in ("", "1"):
        own = {"MINE": "yes", "PYTHONDONTWRITEBYTECODE": no_bytecode}
        done = forked.run([sys.executable, "-c", PROGRAM, "one"], cwd=tmp_path, env={**os.environ, **own})
        assert (done.returncode, done.stderr) == (3, "an error\n")
        assert done.stdout == f"{tmp_path} ['-c', 'one'] yes __main__ {bool(no_bytecode)}\n"
    import common.errors

    assert not hasattr(common.errors, "changed")
    assert "MINE" not in os.environ


def test_modules_and_files_are_programs_too(tmp_path: Path) -> None:
    (tmp_path / "beside.py").write_text("number = 7\n")
    (tmp_path / "program.py").write_text("import sys\nfrom beside import number\nprint(number, sys.argv[1:])\n")
    assert forked.run([sys.executable, tmp_path / "program.py", "x"]).stdout == "7 ['x']\n"
    assert forked.run([sys.executable, "-m", "program", "x"], cwd=tmp_path).stdout == "7 ['x']\n"


def test_an_exception_is_a_traceback_and_status_1() -> None:
    done = forked.run([sys.executable, "-c", "1 / 0"])
    assert done.returncode == 1
    assert done.stderr.endswith("ZeroDivisionError: division by zero\n")
    with pytest.raises(Exception, match="status 1"):
        forked.run([sys.executable, "-c", "raise SystemExit('wrong')"], check=True)

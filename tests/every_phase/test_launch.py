"""Before any import: messages of scripts outside of the environment, and Ctrl-C during imports."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from common.phases import ROOT, Phase

SLOW = 'import time\nprint("importing", flush=True)\nwhile True:\n    time.sleep(0.01)\n'


@pytest.mark.parametrize("script", ["generate.py", "bench.py"])
def test_outside_of_the_environment_one_line_says_what_to_run(phase: Phase, script: str) -> None:
    bare = subprocess.run([sys.executable, "-S", "-E", phase.folder / script], capture_output=True, text=True)
    assert (bare.returncode, bare.stdout) == (2, "")
    assert bare.stderr.count("\n") == 1
    assert bare.stderr.startswith(f"error: {sys.executable} has no package 'common'")
    assert f"`.venv/bin/python {phase.folder.name}/{script}`" in bare.stderr


def test_interrupted_imports_leave_no_traceback(phase: Phase, tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text(SLOW)
    path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    process = subprocess.Popen(
        [sys.executable, phase.folder / "generate.py", "--prompt", "x"],
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background job inherits SIGINT ignored
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "importing\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=300)
    assert (process.returncode, err) == (130, "")


def test_a_terminal_is_told_that_torch_is_imported(phase: Phase, tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise SystemExit(3)")
    ours, theirs = os.openpty()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    done = subprocess.run([sys.executable, phase.folder / "generate.py"], env=environment, stderr=theirs)
    assert done.returncode == 3
    assert os.read(ours, 100) == b"importing torch ...\r"
    os.close(ours)
    os.close(theirs)

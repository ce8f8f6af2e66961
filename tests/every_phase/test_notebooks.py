"""Every cell of every notebook runs; `make test-all` runs them in Jupyter as well, with all of their tokens."""

from __future__ import annotations

import sys
from pathlib import Path

import nbformat
import pytest

from common.phases import ROOT, Phase
from tests.support import forked


@pytest.mark.no_exercise
def test_a_notebook_runs_with_small_numbers(phase: Phase) -> None:
    notebook = phase.folder / "lesson.ipynb"
    nbformat.validate(nbformat.read(notebook, as_version=4))
    command: list[str | Path] = [sys.executable, "-m", "tests.support.notebook", notebook, "--quick"]
    done = forked.run(command, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]

"""Every cell of every notebook runs, answers to exercises too; `make test-all` runs them in Jupyter at full size."""

from __future__ import annotations

import re
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


@pytest.mark.no_exercise
def test_every_exercise_of_a_notebook_has_a_folded_answer(phase: Phase) -> None:
    cells = nbformat.read(phase.folder / "lesson.ipynb", as_version=4).cells
    start = next(at for at, cell in enumerate(cells) if cell.source.startswith("## Exercises\n"))
    exercises = list(zip(cells[start::2], cells[start + 1 :: 2], strict=True))
    for number, (exercise, answer) in enumerate(exercises, 1):
        assert re.search(rf"^{number}\. ", exercise.source, re.MULTILINE)
        assert answer.source.startswith(f"# Answer {number}: ")
        assert answer.metadata == {"jupyter": {"outputs_hidden": True, "source_hidden": True}, "tags": ["answer"]}
    assert not any(cell.get("outputs") for cell in cells), "outputs are not committed"

"""No file of an engine is longer than 320 lines: one idea each, readable in one sitting."""

from __future__ import annotations

from common.phases import Phase

MOST = 320
SUFFIXES = {".py", ".cpp", ".h", ".inl", ".cu", ".cuh"}


def test_no_file_of_the_engine_is_too_long(phase: Phase) -> None:
    long = {}
    for file in sorted((phase.folder / "engine").rglob("*")):
        if file.suffix in SUFFIXES and (lines := len(file.read_text(encoding="utf-8").splitlines())) > MOST:
            long[str(file.relative_to(phase.folder.parent))] = lines
    assert not long

"""Where the phases are. Folders are the only list: a phase exists when its folder does."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Phase:
    """One snapshot: `phase-2-specdec` is number 2, named `specdec`, imported as `phase2`."""

    number: int
    name: str
    folder: Path

    @property
    def package(self) -> str:
        return f"phase{self.number}"


def phases(root: Path = ROOT) -> list[Phase]:
    """All phases of a repository, in order."""
    found = []
    for folder in root.glob("phase-*"):
        match = re.fullmatch(r"phase-(\d+)-([a-z-]+)", folder.name)
        if match and (folder / "engine" / "__init__.py").is_file():
            found.append(Phase(int(match[1]), match[2], folder))
    return sorted(found, key=lambda phase: phase.number)


def phase_of(file: str) -> int:
    """The number of the phase that a file belongs to, from its folder (`phase-2-...`) or package (`phase2`)."""
    for part in reversed(Path(file).resolve().parts):
        match = re.fullmatch(r"phase-?(\d+)(-[a-z-]+)?", part)
        if match:
            return int(match[1])
    raise ValueError(f"{file} is in no phase folder")

"""The list of phases, read from the folders: a phase exists if its folder does."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
EXERCISE_FILE = "exercise.json"


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
    """List all phases of a repository, in order."""
    found = []
    for folder in root.glob("phase-*"):
        match = re.fullmatch(r"phase-(\d+)-([a-z-]+)", folder.name)
        if match and (folder / "engine" / "__init__.py").is_file():
            found.append(Phase(int(match[1]), match[2], folder))
    return sorted(found, key=lambda phase: phase.number)


def installed_phases(site: Path = ROOT) -> list[Phase]:
    """List all phases of an installed wheel, in order: a wheel has packages (`phase2`), but no folders and no names."""
    found = [Phase(int(folder.name.removeprefix("phase")), "", folder) for folder in site.glob("phase[1-9]")]
    return sorted(found, key=lambda phase: phase.number)


def phase_of(file: str) -> int:
    """Return the number of the phase of a file, from its folder (`phase-2-...`) or package (`phase2`).

    An exercise (`lab start`) may have any folder name; its own file has the number.
    """
    for folder in (path := Path(file).resolve(), *path.parents):
        if (folder / EXERCISE_FILE).is_file():
            return int(json.loads((folder / EXERCISE_FILE).read_text(encoding="utf-8"))["phase"])
        match = re.fullmatch(r"phase-?(\d+)(-[a-z-]+)?", folder.name)
        if match:
            return int(match[1])
    raise ValueError(f"{file} is in no phase folder")

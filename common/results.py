"""Result files that survive a kill: rows appended as they come, the environment beside them, resuming.

A results folder holds results.jsonl (one row a line, written the moment it is known), and, rewritten at the end of
every run, results.csv (the same rows) and results.json (the rows with the definitions and the environment).

    python -c "from common.results import environment; print(environment('cpu', 'float32', 2, {}))"
"""

from __future__ import annotations

import csv
import json
import os
import platform
import re
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TextIO

import psutil

from common.errors import UserError

if TYPE_CHECKING:  # torch takes seconds to import; reading and writing results does without
    import torch

SCHEMA_VERSION = 1
# What may differ between a run and its continuation; a difference in the rest would mix two measurements in one file.
MAY_CHANGE = {"timestamp", "commit", "dirty"}


def _output(*command: str) -> str | None:
    """The output of a command, or None where there is no such command or it fails."""
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return run.stdout.strip()


def git_state(root: Path) -> tuple[str | None, bool | None]:
    """The commit of the repository at `root` and whether its tracked files differ; None where `root` is none.

    A folder inside a repository does not count: an installed copy may lie in some other repository, whose commit says
    nothing about the code.
    """
    top = _output("git", "-C", str(root), "rev-parse", "--show-toplevel")
    commit = _output("git", "-C", str(root), "rev-parse", "--verify", "HEAD")
    if top is None or commit is None or Path(top).resolve() != root.resolve():
        return None, None
    return commit, bool(_output("git", "-C", str(root), "status", "--porcelain", "--untracked-files=no"))


def cpu_name() -> str:
    """The processor's name as its maker writes it, or at least its architecture."""
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        return _output("sysctl", "-n", "machdep.cpu.brand_string") or platform.machine()
    return found[1] if found else platform.machine()


def environment(
    device: torch.device | str, dtype: torch.dtype | str, threads: int, models: Mapping[str, str]
) -> dict[str, Any]:
    """What a figure depends on besides its own settings, ready for JSON. `models` maps names to content hashes."""
    import torch

    device = torch.device(device)
    is_cuda = device.type == "cuda"
    driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if is_cuda else None
    commit, dirty = git_state(Path(__file__).parent.parent)
    return {
        "schema_version": SCHEMA_VERSION,
        "timestamp": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit,
        "dirty": dirty,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": cpu_name(),
        "cores": psutil.cpu_count(logical=False) or os.cpu_count(),
        "torch": torch.__version__,
        "device": str(device),
        "device_name": torch.cuda.get_device_name(device) if is_cuda else cpu_name(),
        "driver": driver.splitlines()[0] if driver else None,
        "cuda": torch.version.cuda if is_cuda else None,
        "dtype": str(dtype).removeprefix("torch."),
        "threads": threads,
        "models": dict(models),
    }


def to_plain(value: Any) -> Any:
    """For json.dumps(default=...): numbers and arrays of numpy and torch, and paths."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"a {type(value).__name__} cannot be written as JSON")


def _as_json(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row as it would come back from a file."""
    loaded: dict[str, Any] = json.loads(json.dumps(row, default=to_plain, allow_nan=False))
    return loaded


def _finished_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSONL file; a last line without its end (the writer was killed) is cut off from the file."""
    content = path.read_bytes()
    complete = content[: content.rfind(b"\n") + 1]
    if len(complete) < len(content):
        os.truncate(path, len(complete))
    rows = []
    for number, line in enumerate(complete.splitlines(), 1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict):
            raise UserError(f"{path}, line {number}: not a result row; repair the file or choose another folder")
        rows.append(row)
    return rows


class Results:
    """The rows of one bench, on disk as they come (or, with no folder, in memory alone). Use it in a `with`.

    Raises UserError, before anything is measured, for a folder that cannot be written, for a folder that holds results
    already (without `resume`), and for one whose results come from another environment (with it).
    """

    def __init__(
        self, folder: Path | None, definitions: Mapping[str, str], environment: Mapping[str, Any], resume: bool = False
    ) -> None:
        self.folder = folder
        self.definitions = dict(definitions)
        self.environment = _as_json(environment)
        self.resumed_from: list[dict[str, Any]] = []
        self.rows: list[dict[str, Any]] = []
        self._lines: TextIO | None = None
        if folder is None:
            return
        path = folder / "results.jsonl"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if path.exists() and path.stat().st_size > 0:
                if not resume:
                    raise UserError(f"{path} holds results already; pass --resume to go on, or another --output folder")
                self._read_earlier_environments(folder / "results.json")
                self.rows = _finished_rows(path)
            self._lines = path.open("a", encoding="utf-8", newline="\n")
            self._write_summary()  # now, so that the environment is kept even if this process is killed
        except OSError as error:
            raise UserError(f"--output {folder}: cannot be written ({error.strerror or error})") from None

    def _read_earlier_environments(self, path: Path) -> None:
        try:
            earlier = json.loads(path.read_text(encoding="utf-8"))
            environments = [*earlier["resumed_from"], earlier["environment"]]
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            raise UserError(f"{path}: missing or damaged, so --resume cannot compare; use another folder") from None
        for name, value in self.environment.items():
            before = environments[-1].get(name)
            if name not in MAY_CHANGE and before != value:
                raise UserError(f"--resume: the results in {path.parent} have {name} {before}, this run has {value}")
        self.resumed_from = environments

    def add(self, row: Mapping[str, Any]) -> None:
        """Append a row and have it on the disk when this returns. Raises ValueError for NaN and infinity."""
        try:
            plain = _as_json(row)
        except ValueError as error:
            raise ValueError(f"{error}; the row is {dict(row)}") from None
        self.rows.append(plain)
        if self._lines is not None:
            self._lines.write(json.dumps(plain) + "\n")
            self._lines.flush()
            os.fsync(self._lines.fileno())

    def has(self, key: Mapping[str, Any]) -> bool:
        """Is there a row already with all these values? Synthetic rows count only if the key says synthetic."""
        wanted = {"synthetic": False} | _as_json(key)
        return any(all(({"synthetic": False} | row).get(name) == wanted[name] for name in wanted) for row in self.rows)

    def document(self) -> dict[str, Any]:
        """All that is known, as results.json holds it and as a bench prints it at the end."""
        return {
            "schema_version": SCHEMA_VERSION,
            "definitions": self.definitions,
            "environment": self.environment,
            "resumed_from": self.resumed_from,
            "rows": self.rows,
        }

    def _write_summary(self) -> None:
        """results.json and results.csv, each replaced in one step so that a kill leaves the old or the new one."""
        assert self.folder is not None
        columns = list(dict.fromkeys(name for row in self.rows for name in row))
        for path in (self.folder / "results.json", self.folder / "results.csv"):
            unfinished = path.with_name(path.name + ".unfinished")
            with unfinished.open("w", encoding="utf-8", newline="") as file:
                if path.suffix == ".json":
                    file.write(json.dumps(self.document(), indent=1) + "\n")
                else:
                    writer = csv.writer(file, lineterminator="\n")
                    writer.writerow(columns)
                    # Strings as they are; everything else as JSON, so that true, 1.5 and [1, 2] read the same in both.
                    for row in self.rows:
                        cells = (row.get(name) for name in columns)
                        writer.writerow(
                            [c if isinstance(c, str) else "" if c is None else json.dumps(c) for c in cells]
                        )
            os.replace(unfinished, path)

    def close(self) -> None:
        """Write results.csv and results.json from the rows so far, and let the files go."""
        if self._lines is not None:
            self._lines.close()
            self._lines = None
            self._write_summary()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

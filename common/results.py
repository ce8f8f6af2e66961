"""Results folders: every run is a row on disk when it ends, and a manifest describes machine and settings.

A results folder holds

    results.jsonl    one row a line, appended as the run ends: see results.md, and `Row`
    MANIFEST.json    command, options, environment and model hashes of every invocation that wrote rows
    tables.csv       the derived tables (common/tables.py), written when a bench ends

A kill loses only the run in flight. `resume` runs what is missing and cuts off a torn last line. A folder of another
schema, of other options or of another machine is refused, and so is a second writer.

    python -c "from common.results import environment; print(environment('cpu', 'float32', 2, {}))"
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, TextIO

from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from common.environment import environment
from common.errors import UserError

__all__ = ["ROWS", "SCHEMA_VERSION", "Results", "Row", "environment", "read_manifest", "read_rows", "to_plain"]

SCHEMA_VERSION = 2
ROWS, MANIFEST = "results.jsonl", "MANIFEST.json"
# Options that may differ between two invocations on one folder; any other would mix two measurements.
OPTIONS_MAY_CHANGE = {"output", "resume", "only", "config", "plots", "ray", "cell_timeout"}
ENVIRONMENT_MAY_CHANGE = {"timestamp", "commit", "dirty", "argv", "load_average"}
Scalar = bool | int | float | str | None


class Row(BaseModel):
    """One run, timed or only counted. results.md documents the fields."""

    model_config = ConfigDict(extra="forbid")

    kind: Literal["run", "count", "end"] = Field(
        description="`run`: timed in turns with other variants; `count`: not timed; `end`: the cell is complete"
    )
    section: str = Field(description="the section of the bench, as `--only` names it, or a part of one")
    cell: dict[str, Scalar] = Field(default={}, description="the settings that all variants of one comparison share")
    variant: str = Field(default="", description="what ran; the null arm is the baseline's name with `, again`")
    baseline: str | None = Field(default=None, description="`run`: the variant that this one is compared with")
    prompt: str | None = Field(default=None, description="id of the prompt; null for work without prompts")
    round: int | None = Field(default=None, ge=0, description="`run`: number of the round, from 0")
    order: int | None = Field(
        default=None, ge=0, description="`run`: place in the order of this round's variants, from 0"
    )
    seconds: float | None = Field(default=None, ge=0, description="`run`: wall time, in seconds")
    tokens: float | None = Field(default=None, ge=0, description="new tokens (or calls) that `seconds` was spent on")
    load: float | None = Field(default=None, description="`run`: load average over one minute when the run ended")
    figures: dict[str, Any] = Field(
        default={}, description="what else was counted or measured, by name (the bench defines it)"
    )
    status: Literal["ok", "failed", "refused"] = Field(
        default="ok",
        description="`failed`: an exception or no memory; `refused`: a wrong result, or a setting that cannot run",
    )
    reason: str | None = Field(default=None, description="why the run failed or was refused")
    synthetic: bool = Field(default=False, description="true: a dry run; nothing was computed")

    @property
    def key(self) -> str:
        """Identify the run within its folder."""
        return json.dumps(
            [self.kind, self.section, self.cell, self.variant, self.prompt, self.round, self.synthetic], sort_keys=True
        )


def to_plain(value: Any) -> Any:
    """Convert for json.dumps(default=...): numbers and arrays of numpy and torch, and paths."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"a {type(value).__name__} cannot be written as JSON")


def _plain(value: Any) -> Any:
    """Return the value as read back from a file. Raises ValueError for NaN and infinity."""
    return json.loads(json.dumps(value, default=to_plain, allow_nan=False))


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read the manifest of a results folder. Raises UserError for any other folder and for another schema."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        schema = manifest["schema_version"]
    except (OSError, ValueError, KeyError, TypeError):
        if (folder / "results.json").exists():
            schema, manifest = 1, {}
        else:
            raise UserError(
                f"{folder} is not a results folder: it has no readable {MANIFEST}; name a folder that a bench wrote"
            ) from None
    if schema != SCHEMA_VERSION:
        raise UserError(
            f"{folder} holds results of schema {schema}, this version reads schema {SCHEMA_VERSION}; measure again"
        )
    found: dict[str, Any] = manifest
    return found


def read_rows(folder: Path, repair: bool = False) -> list[Row]:
    """Read the rows of a results folder. A torn last line (the writer was killed) is ignored; `repair` cuts it off.

    Raises UserError for a folder without rows and for an invalid line.
    """
    path = folder / ROWS
    try:
        content = path.read_bytes()
    except OSError:
        raise UserError(f"{folder} is not a results folder: it has no {ROWS}") from None
    complete = content[: content.rfind(b"\n") + 1]
    if repair and len(complete) < len(content):
        os.truncate(path, len(complete))
    rows = []
    for number, line in enumerate(complete.splitlines(), 1):
        try:
            rows.append(Row.model_validate_json(line))
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(map(str, first["loc"])) or "the line"
            raise UserError(
                f"{path}, line {number}: not a row of schema {SCHEMA_VERSION} ({where}: {first['msg']}); "
                "repair the file or choose another folder"
            ) from None
    return rows


class Results:
    """The rows of one bench, written to disk one by one (or, without a folder, kept in memory). Use it in a `with`.

    Raises UserError, before anything is measured, for a folder that is not writable or is in use elsewhere. Without
    `resume`, a folder must not hold results yet; with it, the results must have the same options and the same machine.
    """

    def __init__(
        self,
        folder: Path | None,
        definitions: Mapping[str, str],
        environment: Mapping[str, Any],
        options: Mapping[str, Any] | None = None,
        resume: bool = False,
    ) -> None:
        self.folder = folder
        self.definitions = dict(definitions)
        self.environment: dict[str, Any] = _plain(dict(environment))
        self.options: dict[str, Any] = _plain(dict(options or {}))
        self.invocations: list[dict[str, Any]] = []
        self.rows: list[Row] = []
        self._keys: set[str] = set()
        self._lines: TextIO | None = None
        self._lock: FileLock | None = None
        if folder is None:
            self._begin()
            return
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = FileLock(folder / ".lock")
            self._lock.acquire(timeout=0)
            self._open(folder, resume)
        except Timeout:
            raise UserError(
                f"--output {folder}: another bench is writing there; wait for it, or choose another"
            ) from None
        except OSError as error:
            self._release()
            raise UserError(f"--output {folder}: cannot be written ({error.strerror or error})") from None
        except UserError:
            self._release()
            raise

    def _open(self, folder: Path, resume: bool) -> None:
        path = folder / ROWS
        old = (folder / "results.json").exists() or (folder / MANIFEST).exists()
        if old or (path.exists() and path.stat().st_size > 0):
            manifest = read_manifest(folder)
            if not resume:
                raise UserError(f"{folder} holds results already; pass --resume to go on, or another --output folder")
            self._compare(manifest)
            self.invocations = manifest["invocations"]
            self.rows = read_rows(folder, repair=True) if path.exists() else []
            self._keys = {row.key for row in self.rows}
        self._begin()
        self._lines = path.open("a", encoding="utf-8", newline="\n")
        self._write_manifest()  # now, in case this process is killed

    def _begin(self) -> None:
        invocation = {"environment": self.environment, "options": self.options, "first_row": len(self.rows)}
        self.invocations.append(invocation)

    def _compare(self, manifest: Mapping[str, Any]) -> None:
        before = manifest["invocations"][-1]
        for what, mine, may_change in (
            ("options", self.options, OPTIONS_MAY_CHANGE),
            ("environment", self.environment, ENVIRONMENT_MAY_CHANGE),
        ):
            for name in sorted((mine.keys() | before[what].keys()) - may_change):
                then, now = before[what].get(name), mine.get(name)
                if then != now:
                    label = f"--{name.replace('_', '-')}" if what == "options" else name
                    raise UserError(
                        f"--resume: the results in {self.folder} were made with {label} {then}, this run has {now}; "
                        "give the same, or choose another --output folder"
                    )

    def add(self, row: Row) -> None:
        """Append a row; the row is in the file on return. Raises ValueError for NaN and infinity."""
        try:
            line = json.dumps(_plain(row.model_dump(exclude_defaults=True)), allow_nan=False)
        except ValueError as error:
            raise ValueError(f"{error}; the row is {row}") from None
        row = Row.model_validate_json(line)  # as a reader sees it
        self.rows.append(row)
        self._keys.add(row.key)
        if self._lines is not None:
            self._lines.write(line + "\n")
            self._lines.flush()

    def has(self, row: Row) -> bool:
        """Return whether this run has a row already, successful or not."""
        return row.key in self._keys

    @property
    def failures(self) -> list[Row]:
        """List the runs that failed or were refused."""
        return [row for row in self.rows if row.status != "ok"]

    def manifest(self) -> dict[str, Any]:
        """Return the contents of MANIFEST.json."""
        return {
            "schema_version": SCHEMA_VERSION,
            "definitions": self.definitions,
            "invocations": self.invocations,
            "rows": len(self.rows),
            "failures": len(self.failures),
        }

    def _write_manifest(self) -> None:
        """Replace the file in one step, so that a kill leaves the old or the new one."""
        assert self.folder is not None
        replace(self.folder / MANIFEST, json.dumps(self.manifest(), indent=1) + "\n")

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.release()

    def close(self) -> None:
        """Write the manifest and close the files."""
        if self._lines is not None:
            self._lines.close()
            self._lines = None
            self._write_manifest()
        self._release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def replace(path: Path, text: str) -> None:
    """Replace a text file in one step."""
    unfinished = path.with_name(path.name + ".unfinished")
    unfinished.write_text(text, encoding="utf-8", newline="\n")
    os.replace(unfinished, path)


def failures(rows: Sequence[Row]) -> list[str]:
    """Return one line for every setting that failed or was refused."""
    lines = (
        f"{row.section} {row.cell} {row.variant}: {row.status}: {row.reason}" for row in rows if row.status != "ok"
    )
    return list(dict.fromkeys(lines))

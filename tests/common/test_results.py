"""Results folders: rows written at once, resuming, refusing to mix two measurements, one writer."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.environment import environment, git_state
from common.errors import UserError
from common.phases import ROOT, phases
from common.results import SCHEMA_VERSION, Results, Row, failures, read_manifest, read_rows

ENVIRONMENT = {"torch": "2.13.0", "dtype": "float32", "timestamp": "t0", "commit": "a"}
OPTIONS = {"max_k": 2, "prompts": 2, "output": "x", "resume": False}
DEFINITIONS = {"speedup": "plain seconds / speculative seconds"}


def _results(
    folder: Path | None, resume: bool = False, options: dict[str, Any] | None = None, **changes: Any
) -> Results:
    return Results(folder, DEFINITIONS, ENVIRONMENT | changes, OPTIONS | (options or {}), resume)


def _row(round_: int, **fields: Any) -> Row:
    made: dict[str, Any] = {"kind": "run", "section": "speed", "variant": "plain", "round": round_, "seconds": 0.5}
    return Row(**(made | fields))


def _rounds(folder: Path) -> list[int | None]:
    return [row.round for row in read_rows(folder)]


def test_a_row_is_on_disk_as_soon_as_it_is_added(tmp_path: Path) -> None:
    script = """
import os, sys
from pathlib import Path
from common.results import Results, Row
results = Results(Path(sys.argv[1]), {}, {"torch": "2.13.0"})
for round_ in (0, 1):
    results.add(Row(kind="run", section="s", round=round_))
os._exit(9)  # no buffer is flushed and no handler runs, as with kill -9
"""
    killed = subprocess.run([sys.executable, "-c", script, str(tmp_path / "run")], cwd=ROOT)
    assert killed.returncode == 9
    assert _rounds(tmp_path / "run") == [0, 1]
    with Results(tmp_path / "run", {}, {"torch": "2.13.0"}, resume=True) as results:  # the lock died with its owner
        assert results.has(Row(kind="run", section="s", round=1))
        assert not results.has(Row(kind="run", section="s", round=2))


def test_resume_drops_a_torn_line_and_keeps_the_rest(tmp_path: Path) -> None:
    with _results(tmp_path) as results:
        results.add(_row(0))
    with (tmp_path / "results.jsonl").open("a") as file:
        file.write('{"kind": "run", "seco')
    assert _rounds(tmp_path) == [0]  # readers ignore it
    with _results(tmp_path, resume=True) as results:
        assert results.has(_row(0))
        assert not results.has(_row(1))
        results.add(_row(1))
    assert _rounds(tmp_path) == [0, 1]


@pytest.mark.parametrize("line", ['{"kind": ', '{"k": 1}', "[]", '{"kind": "run", "section": "s", "seconds": -1}'])
def test_a_damaged_line_that_no_kill_explains_is_named(tmp_path: Path, line: str) -> None:
    with _results(tmp_path) as results:
        results.add(_row(0))
    good = (tmp_path / "results.jsonl").read_text()
    (tmp_path / "results.jsonl").write_text(good + line + "\n" + good)
    with pytest.raises(UserError, match="line 2: not a row of schema 2"):
        _results(tmp_path, resume=True)
    assert (tmp_path / "results.jsonl").read_text() == good + line + "\n" + good


def test_existing_results_are_not_touched_without_resume(tmp_path: Path) -> None:
    with _results(tmp_path) as results:
        results.add(_row(0))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(UserError, match="--resume"):
        _results(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_resume_refuses_other_options_and_another_machine(tmp_path: Path) -> None:
    with _results(tmp_path) as results:
        results.add(_row(0))
    with pytest.raises(UserError, match=r"made with --max-k 2, this run has 3"):
        _results(tmp_path, resume=True, options={"max_k": 3, "prompts": 5})
    with pytest.raises(UserError, match=r"made with dtype float32, this run has bfloat16"):
        _results(tmp_path, resume=True, dtype="bfloat16")
    with _results(tmp_path, resume=True, options={"output": "y", "resume": True}, timestamp="t1", commit="b"):
        pass
    manifest = read_manifest(tmp_path)
    assert [each["environment"]["timestamp"] for each in manifest["invocations"]] == ["t0", "t1"]
    assert [each["first_row"] for each in manifest["invocations"]] == [0, 1]
    assert (manifest["rows"], manifest["failures"], manifest["definitions"]) == (1, 0, DEFINITIONS)


def test_a_second_writer_is_refused(tmp_path: Path) -> None:
    with _results(tmp_path) as results:
        results.add(_row(0))
        script = f"""
from pathlib import Path
from common.results import Results
Results(Path({str(tmp_path)!r}), {{}}, {{}}, resume=True)
"""
        second = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
        assert second.returncode != 0
        assert "another bench is writing there" in second.stderr
    with _results(tmp_path, resume=True):
        pass


def test_other_folders_and_other_schemas_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a results folder"):
        read_manifest(tmp_path)
    with pytest.raises(UserError, match="not a results folder"):
        read_rows(tmp_path)
    (tmp_path / "results.json").write_text('{"schema_version": 1}')
    (tmp_path / "results.jsonl").write_text('{"kind": "speed"}\n')
    for resume in (False, True):
        with pytest.raises(UserError, match="schema 1, this version reads schema 2"):
            _results(tmp_path, resume=resume)
    (tmp_path / "MANIFEST.json").write_text('{"schema_version": 99}')
    with pytest.raises(UserError, match="schema 99"):
        _results(tmp_path, resume=True)
    (tmp_path / "MANIFEST.json").write_text("not JSON")
    (tmp_path / "results.json").unlink()
    with pytest.raises(UserError, match="not a results folder"):
        _results(tmp_path, resume=True)


def test_synthetic_rows_are_never_mistaken_for_real_ones() -> None:
    with _results(None) as results:
        results.add(_row(0, synthetic=True))
        assert not results.has(_row(0))
        assert results.has(_row(0, synthetic=True))


def test_a_key_is_compared_as_it_would_be_read_back() -> None:
    with _results(None) as results:
        results.add(_row(0, cell={"k": np.int64(4).item(), "temperature": 1.0}))
        assert results.has(_row(0, cell={"temperature": 1.0, "k": 4}))
        assert not results.has(_row(0, cell={"k": 4}))
        assert not results.has(_row(0, cell={"temperature": 1.0, "k": 4}, prompt="p"))


def test_figures_of_numpy_are_written_and_nan_is_refused(tmp_path: Path) -> None:
    with _results(tmp_path) as results:
        results.add(_row(0, figures={"survived": np.array([2, 1])}))
        with pytest.raises(ValueError, match="the row is"):
            results.add(_row(1, figures={"loss": float("nan")}))
        results.add(_row(2))
    assert [row.figures for row in read_rows(tmp_path)] == [{"survived": [2, 1]}, {}]
    assert _rounds(tmp_path) == [0, 2]


def test_failures_are_counted_and_listed_once_per_setting(tmp_path: Path) -> None:
    with _results(tmp_path) as results:
        for round_ in (0, 1):
            results.add(_row(round_, variant="k=9", status="failed", reason="RuntimeError: no memory"))
        assert len(results.failures) == 2
        assert failures(results.rows) == ["speed {} k=9: failed: RuntimeError: no memory"]
    assert read_manifest(tmp_path)["failures"] == 2


def test_an_unwritable_folder_is_said_before_the_run(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        _results(tmp_path / "file" / "results")
    with pytest.raises(UserError, match="cannot be written"):
        _results(tmp_path / "file")


def test_the_schema_document_lists_every_field_and_every_kind() -> None:
    text = (ROOT / "common" / "results.md").read_text(encoding="utf-8")
    table = dict(line.strip("| \n").split(" | ", 1) for line in text.splitlines() if line.startswith("| `"))
    described = {f"`{name}`": field.description for name, field in Row.model_fields.items()}
    assert table == described
    assert f"schema_version: {SCHEMA_VERSION}" in text


@pytest.mark.parametrize("folder", [ROOT, *(phase.folder for phase in phases())], ids=lambda path: path.name)
def test_committed_results_are_rows_of_this_schema_from_a_clean_commit(folder: Path) -> None:
    manifest, rows = read_manifest(folder / "results"), read_rows(folder / "results")
    assert len(rows) == manifest["rows"] > 0
    assert not any(row.synthetic for row in rows)
    for invocation in manifest["invocations"]:
        where = invocation["environment"]
        assert where["dirty"] is False
        assert {"commit", "argv", "models", "prompts_sha256", "libraries", "instruction_set"} <= set(where)
        assert {"seed", "prompts", "max_tokens"} <= set(invocation["options"])


def test_environment_names_what_a_figure_depends_on() -> None:
    found = environment("cpu", "float32", threads=2, models={"stdlib-10m": "abc"}, prompts_sha256="def")
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert (found["device"], found["dtype"], found["threads"]) == ("cpu", "float32", 2)
    assert (found["models"], found["prompts_sha256"]) == ({"stdlib-10m": "abc"}, "def")
    assert found["timestamp"].endswith("+00:00")
    assert found["driver"] is None
    assert found["device_name"] == found["cpu"] != ""
    assert len(found["load_average"]) == 3
    assert found["libraries"]["transformers"].startswith("5.")
    assert found["argv"][1:] == sys.argv[1:]
    assert json.loads(json.dumps(found)) == found


def test_the_commit_is_that_of_the_checkout_and_of_no_repository_around_it(tmp_path: Path) -> None:
    inside = tmp_path / "site-packages"
    inside.mkdir()
    (inside / "code.py").write_text("a = 1\n")

    def commit_all(folder: Path) -> str:
        who = ["-c", "user.name=n", "-c", "user.email=e@example.org", "-c", "commit.gpgsign=no"]
        for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "all"]):
            subprocess.run(["git", "-C", str(folder), *who, *command], check=True)
        head = ["git", "-C", str(folder), "rev-parse", "HEAD"]
        return subprocess.run(head, check=True, capture_output=True, text=True).stdout.strip()

    assert git_state(inside) == (None, None)
    commit_all(tmp_path)
    assert git_state(inside) == (None, None)
    commit = commit_all(inside)
    assert git_state(inside) == (commit, False)
    (inside / "new.py").write_text("")
    assert git_state(inside) == (commit, False)
    (inside / "code.py").write_text("a = 2\n")
    assert git_state(inside) == (commit, True)

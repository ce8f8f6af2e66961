"""Result files: kept row by row, resumable after a kill, never overwritten, the same in every format."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.errors import UserError
from common.results import Results, environment, git_state

ENVIRONMENT = {"torch": "2.13.0", "dtype": "float32", "timestamp": "t0", "commit": "a"}
DEFINITIONS = {"speedup": "plain seconds / speculative seconds"}


def _results(folder: Path | None, resume: bool = False, **changes: Any) -> Results:
    return Results(folder, DEFINITIONS, ENVIRONMENT | changes, resume)


def _lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def test_a_row_is_on_disk_as_soon_as_it_is_added(tmp_path: Path) -> None:
    script = """
import os, sys
from pathlib import Path
from common.results import Results
results = Results(Path(sys.argv[1]), {}, {"torch": "2.13.0"}, resume=False)
results.add({"k": 1, "seconds": 0.5})
results.add({"k": 2, "seconds": 0.25})
os._exit(9)  # no buffer is flushed, no handler runs: as with kill -9
"""
    root = Path(__file__).resolve().parents[2]
    killed = subprocess.run([sys.executable, "-c", script, str(tmp_path / "run")], cwd=root)
    assert killed.returncode == 9
    assert _lines(tmp_path / "run") == [{"k": 1, "seconds": 0.5}, {"k": 2, "seconds": 0.25}]
    with Results(tmp_path / "run", {}, {"torch": "2.13.0"}, resume=True) as results:
        assert results.has({"k": 2})
        assert not results.has({"k": 3})


def test_resume_drops_a_half_written_line_and_keeps_the_rest(tmp_path: Path) -> None:
    with _results(tmp_path) as results:
        results.add({"k": 1})
    with (tmp_path / "results.jsonl").open("a") as file:
        file.write('{"k": 2, "seco')
    with _results(tmp_path, resume=True) as results:
        assert results.has({"k": 1})
        assert not results.has({"k": 2})
        results.add({"k": 2})
    assert _lines(tmp_path) == [{"k": 1}, {"k": 2}]


def test_resume_refuses_a_damaged_line_that_no_kill_explains(tmp_path: Path) -> None:
    with _results(tmp_path) as results:
        results.add({"k": 1})
    (tmp_path / "results.jsonl").write_text('{"k": 1}\n{"k": \n{"k": 3}\n')
    with pytest.raises(UserError, match="line 2"):
        _results(tmp_path, resume=True)
    assert (tmp_path / "results.jsonl").read_text().endswith('{"k": 3}\n')


def test_existing_results_are_not_touched_without_resume(tmp_path: Path) -> None:
    with _results(tmp_path) as results:
        results.add({"k": 1})
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(UserError, match="--resume"):
        _results(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_run_that_ended_before_its_first_row_needs_no_resume(tmp_path: Path) -> None:
    _results(tmp_path).close()
    with _results(tmp_path) as results:
        results.add({"k": 1})
    assert _lines(tmp_path) == [{"k": 1}]


def test_resume_keeps_the_earlier_environment_and_refuses_another(tmp_path: Path) -> None:
    with _results(tmp_path) as results:
        results.add({"k": 1})
    with pytest.raises(UserError, match="dtype float32, this run has bfloat16"):
        _results(tmp_path, resume=True, dtype="bfloat16")
    with _results(tmp_path, resume=True, timestamp="t1", commit="b"):
        pass
    with _results(tmp_path, resume=True, timestamp="t2", commit="b") as results:
        document = results.document()
    assert [earlier["timestamp"] for earlier in document["resumed_from"]] == ["t0", "t1"]
    assert document["environment"]["timestamp"] == "t2"
    (tmp_path / "results.json").unlink()
    with pytest.raises(UserError, match="another folder"):
        _results(tmp_path, resume=True)


def test_synthetic_rows_are_never_mistaken_for_real_ones() -> None:
    with _results(None) as results:
        results.add({"k": 1, "synthetic": True})
        assert not results.has({"k": 1})
        assert results.has({"k": 1, "synthetic": True})
        results.add({"k": 2})
        assert results.has({"k": 2, "synthetic": False})
        assert not results.has({"k": 2, "synthetic": True})


def test_a_key_is_compared_as_it_would_be_read_back() -> None:
    with _results(None) as results:
        results.add({"shape": (2, 3), "k": np.int64(4)})
        assert results.has({"shape": (2, 3), "k": 4})
        assert not results.has({"shape": (2, 3), "k": 4, "temperature": 1.0})


def test_all_files_hold_the_same_rows(tmp_path: Path) -> None:
    rows = [
        {"name": 'commas, "quotes"\nlines', "k": 4, "ok": True, "seconds": 0.1},
        {"name": "b", "survival": [1.0, 0.5], "seconds": np.float32(0.5), "peak": None},
    ]
    with _results(tmp_path) as results:
        for row in rows:
            results.add(row)
    from_jsonl = _lines(tmp_path)
    assert from_jsonl[0] == rows[0]
    assert from_jsonl[1] == {"name": "b", "survival": [1.0, 0.5], "seconds": 0.5, "peak": None}
    document = json.loads((tmp_path / "results.json").read_text())
    assert document["rows"] == from_jsonl
    assert document["definitions"] == DEFINITIONS
    assert document["environment"] == ENVIRONMENT
    with (tmp_path / "results.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    for cells, row in zip(table, from_jsonl, strict=True):
        assert list(cells) == ["name", "k", "ok", "seconds", "survival", "peak"]
        filled = {name: value for name, value in row.items() if value is not None}
        assert {n: c if n == "name" else json.loads(c) for n, c in cells.items() if c} == filled


def test_an_interrupted_run_keeps_its_rows_in_all_files(tmp_path: Path) -> None:
    def interrupted() -> None:
        with _results(tmp_path) as results:
            results.add({"k": 1})
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert json.loads((tmp_path / "results.json").read_text())["rows"] == [{"k": 1}]
    assert (tmp_path / "results.csv").read_text() == "k\n1\n"


def test_an_unwritable_folder_is_said_before_the_run(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        _results(tmp_path / "file" / "results")
    with pytest.raises(UserError, match="cannot be written"):
        _results(tmp_path / "file")


def test_nan_is_refused_and_leaves_the_file_whole(tmp_path: Path) -> None:
    with _results(tmp_path) as results:
        with pytest.raises(ValueError, match="loss"):
            results.add({"loss": float("nan")})
        results.add({"loss": 1.0})
    assert _lines(tmp_path) == [{"loss": 1.0}]


def test_environment_names_what_a_figure_depends_on() -> None:
    found = environment("cpu", "float32", threads=2, models={"stdlib-10m": "abc"})
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert (found["device"], found["dtype"], found["threads"]) == ("cpu", "float32", 2)
    assert found["models"] == {"stdlib-10m": "abc"}
    assert found["timestamp"].endswith("+00:00")
    assert found["driver"] is None
    assert found["device_name"] == found["cpu"] != ""
    assert json.loads(json.dumps(found)) == found


def test_the_commit_is_that_of_the_checkout_and_of_no_repository_around_it(tmp_path: Path) -> None:
    inside = tmp_path / "site-packages"
    inside.mkdir()
    (inside / "code.py").write_text("a = 1\n")

    def commit_all(folder: Path) -> str:
        git = [
            "git",
            "-C",
            str(folder),
            "-c",
            "user.name=n",
            "-c",
            "user.email=e@example.org",
            "-c",
            "commit.gpgsign=no",
        ]
        for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "all"]):
            subprocess.run([*git, *command], check=True)
        return subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()

    assert git_state(inside) == (None, None)
    commit_all(tmp_path)
    assert git_state(inside) == (None, None)
    commit = commit_all(inside)
    assert git_state(inside) == (commit, False)
    (inside / "new.py").write_text("")
    assert git_state(inside) == (commit, False)
    (inside / "code.py").write_text("a = 2\n")
    assert git_state(inside) == (commit, True)

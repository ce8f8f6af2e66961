"""The manifest of `make gpu`, and a dry run from end to end."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from common.errors import UserError
from common.gpu_manifest import main, manifest
from common.phases import phases

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def results(tmp_path: Path) -> Path:
    folder = tmp_path / "results"
    (folder / "phase-1-one").mkdir(parents=True)
    (folder / "phase-1-one/results.jsonl").write_text('{"kind": "speed"}\n{"kind": "speed", "synthetic": false}\n')
    (folder / "tests.txt").write_text("passed")
    (folder / "parts.tsv").write_text("tests\t0\t20\nphase-1-one\t1\t40\n")
    return folder


def test_it_says_what_ran_how_long_and_which_files_it_left(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(results)]) == 0
    assert "failed" in capsys.readouterr().out
    written = json.loads((results / "manifest.json").read_text())
    assert (written["seconds"], written["rows"], written["synthetic"]) == (60, 2, False)
    assert written["parts"][1] == {"name": "phase-1-one", "status": 1, "seconds": 40}
    assert {"commit", "device_name", "driver", "torch"} <= set(written["environment"])
    assert list(written["files"]) == ["phase-1-one/results.jsonl", "tests.txt"]
    assert written["files"]["tests.txt"] == {"bytes": 6, "sha256": hashlib.sha256(b"passed").hexdigest()}


def test_synthetic_rows_are_named_and_too_long_a_run_is_noted(
    results: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (results / "phase-1-one/results.jsonl").write_text('{"kind": "speed", "synthetic": true}\n')
    (results / "parts.tsv").write_text("tests\t0\t601\n")
    main([str(results)])
    out, err = capsys.readouterr()
    assert "synthetic" in out
    assert "601 s is over the limit" in err
    assert manifest(results)["synthetic"] is True


@pytest.mark.parametrize("content", [None, "tests\t0\n", "tests\tx\t1\n"])
def test_without_its_parts_a_folder_is_refused(content: str | None, results: Path) -> None:
    (results / "parts.tsv").unlink()
    if content is not None:
        (results / "parts.tsv").write_text(content)
    with pytest.raises(UserError, match=r"parts.tsv: missing or damaged"):
        main([str(results)])
    with pytest.raises(UserError, match="expected one folder"):
        main([str(results / "nowhere")])


@pytest.mark.slow
def test_a_dry_run_of_make_gpu_goes_through(tmp_path: Path) -> None:
    """Run every bench and the manifest, without a GPU and without computing."""
    clean = {name: value for name, value in os.environ.items() if "MAKE" not in name}
    variables = [f"OUT={tmp_path}", f"GPU_PYTHON={sys.executable}", f"VENV={tmp_path / 'venv'}", "DRY_RUN=1"]
    run = subprocess.run(["make", "gpu", *variables], cwd=ROOT, env=clean, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stdout + run.stderr
    written = json.loads((tmp_path / "dry-run/manifest.json").read_text())
    benches = [phase.folder.name for phase in reversed(phases())]
    assert [part["name"] for part in written["parts"]] == ["graphs", "tests", *benches]
    assert written["synthetic"] is True
    for phase in phases():
        rows = (tmp_path / "dry-run" / phase.folder.name / "results.jsonl").read_text().splitlines()
        assert rows
        assert all(json.loads(row)["synthetic"] for row in rows)

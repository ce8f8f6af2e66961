"""`lab bench` runs the bench of every phase at its quick size, keeps going where one fails, and sums up."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from common.errors import UserError
from common.lab import bench
from common.results import Results, Row


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Replace programs by one that writes a row; phase 2's fails."""
    found: list[list[str]] = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        found.append(command[1:])
        output = Path(command[command.index("--output") + 1])
        with Results(output, {}, {}, {}) as results:
            results.add(Row(kind="count", section="speed", status="refused" if "phase-3" in str(output) else "ok"))
        return subprocess.CompletedProcess(command, 1 if "phase-2" in str(output) else 0)

    monkeypatch.setattr("common.lab.bench.subprocess.run", run)
    return found


def test_every_phase_and_the_time_machine(
    calls: list[list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench.run(["--output", str(tmp_path)]) == 1
    names = [Path(call[0]).parent.name for call in calls[:-1]]
    assert names == [phase.folder.name for phase in bench.chosen([])]
    assert all(call[1:4] == ["--quick", "--device", "cpu"] for call in calls[:-1])
    assert calls[-1][:3] == ["-m", "common.lab.cli", "demo"]
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    by_name = {part["name"].partition("-")[2][:1]: part for part in document["parts"]}
    assert (by_name["2"]["status"], by_name["1"]["status"]) == (1, 0)
    assert (by_name["3"]["left_out"], by_name["3"]["rows"]) == (1, 1)


def test_one_phase_alone(calls: list[list[str]], tmp_path: Path) -> None:
    assert bench.run(["--phase", "1", "--output", str(tmp_path / "new")]) == 0
    assert len(calls) == 1


def test_bad_input_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--phase 99: the phases with a bench are 1, 2"):
        bench.run(["--phase", "99"])
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is not empty"):
        bench.run(["--output", str(tmp_path)])

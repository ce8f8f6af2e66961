"""A saved run is measured again with its own options, and the two folders are compared."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from common.errors import UserError
from common.results import Results, Row, read_manifest, read_rows
from tests.support.beside import beside

reproduce = beside(7, "instruments.reproduce")
sweep = beside(7, "instruments.sweep")


def fake_cells(tasks: Sequence[Any], timeout: float) -> Iterator[tuple[Any, Row | None]]:
    """Yield rows as a cell's process does: the variant is always twice as fast."""
    for task in tasks:
        for prompt in range(5):
            for order, (name, seconds) in enumerate((("plain", 2.0), ("plain, again", 2.0), ("k=1", 1.0))):
                row = Row(
                    kind="run", section="sweep", cell=task.cell.settings, variant=name, prompt=str(prompt), round=0
                )
                baseline = None if name == "plain" else "plain"
                found = {"order": order, "seconds": seconds + prompt / 100, "tokens": 4.0, "baseline": baseline}
                yield task.cell, row.model_copy(update=found)
        yield task.cell, Row(kind="end", section="sweep", cell=task.cell.settings)
        yield task.cell, None


def test_a_sweep_is_run_again_and_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sweep, "local", fake_cells)
    one, other = tmp_path / "one", tmp_path / "other"
    options = sweep.SweepOptions(grid=["k=1", "temperature=0,1"], output=one, device="cpu", seed=3, plots=False)
    assert sweep.sweep(options) == 0
    capsys.readouterr()
    assert reproduce.run([str(one), "--output", str(other)]) == 0
    assert [row.key for row in read_rows(one)] == [row.key for row in read_rows(other)]
    assert read_manifest(other)["invocations"][0]["options"]["seed"] == 3
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [line["differs"] for line in document["comparisons"] if line["variant"] == "k=1"] == [False, False]


def test_a_bench_is_called_as_before_with_another_folder(tmp_path: Path) -> None:
    """Every invocation runs again, in its order; the folder's own options go."""
    calls = tmp_path / "calls"
    program = f"import sys, pathlib; print(sys.argv[1:], file=pathlib.Path({str(calls)!r}).open('a'))\n"
    (tmp_path / "bench.py").write_text(program, encoding="utf-8")
    folder = tmp_path / "results"
    argv = [
        ["bench.py", "--output", "results", "--rounds", "3"],
        ["bench.py", "--resume", "--output=results", "--only", "x"],
    ]
    for number, words in enumerate(argv):
        with Results(folder, {}, {"argv": words}, {}, resume=number > 0) as results:
            results.add(Row(kind="count", section="speed", round=number))
    assert reproduce.again(folder, tmp_path / "new") == 0
    out = str(tmp_path / "new")
    expected = [["--rounds", "3", "--output", out], ["--only", "x", "--output", out, "--resume"]]
    assert calls.read_text(encoding="utf-8").splitlines() == list(map(repr, expected))


def test_what_cannot_be_run_again_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a results folder"):
        reproduce.run([str(tmp_path)])
    with Results(tmp_path / "results", {}, {"argv": ["x"]}, {}) as results:
        results.add(Row(kind="count", section="speed"))
    with pytest.raises(UserError, match=r"no bench\.py beside it"):
        reproduce.run([str(tmp_path / "results"), "--output", str(tmp_path / "new")])
    with Results(tmp_path / "dry", {}, {"argv": ["x"]}, {}) as results:
        results.add(Row(kind="count", section="speed", synthetic=True))
    with pytest.raises(UserError, match="dry run"):
        reproduce.run([str(tmp_path / "dry"), "--output", str(tmp_path / "new")])

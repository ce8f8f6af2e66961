"""The harness of a bench: what is measured again and what not, dry runs, ratios as columns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from common.benchmark import BenchOptions, Results
from common.harness import Bench


def bench(results: Results, **options: Any) -> Bench:
    return Bench(BenchOptions(**options), results, torch.device("cpu"))


def test_a_dry_run_calls_nothing_and_its_rows_stand_for_no_real_ones(tmp_path: Path) -> None:
    def fail() -> None:
        raise AssertionError("a dry run computes nothing")

    with Results(tmp_path, {}, {}) as results:
        dry = bench(results, dry_run=True)
        times = dry.times("runs", {"a": fail, "b": fail}, repeats=5)
        dry.add(kind="speed", **dry.ratio("speedup", times["a"], times["b"]))
        assert dry.done(kind="speed")
        real = bench(results)
        assert not real.done(kind="speed")
        assert (real.mark, dry.mark) == ("", " (synthetic)")
    with Results(tmp_path, {}, {}, resume=True) as results:
        assert bench(results, dry_run=True).done(kind="speed")
        assert [row["speedup_high"] for row in bench(results).rows("speed")] == [1.0]


def test_a_table_shows_a_ratio_with_its_interval_in_one_column(capsys: pytest.CaptureFixture[str]) -> None:
    with Results(None, {}, {}) as results:
        made = bench(results)
        made.add(kind="speed", name="old", **made.ratio("speedup", [2.0, 2.0], [1.0, 1.0]))
        made.add(kind="other", name="elsewhere")
        made.add(kind="speed", name="new", rows=3)
        made.table("speed", "Speed")
    header, _, old, new = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert [cell.strip() for cell in header.strip("|").split("|")] == ["name", "speedup", "rows"]
    assert [cell.strip() for cell in old.strip("|").split("|")] == ["old", "2.00 [2.00, 2.00]", "-"]
    assert [cell.strip() for cell in new.strip("|").split("|")] == ["new", "-", "3"]


def test_bfloat16_is_measured_only_where_it_multiplies_no_slower(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def dtypes(seconds: float, **options: Any) -> list[torch.dtype]:
        monkeypatch.setattr(Bench, "times", lambda *_: {"float32": [1.0, 1.0, 9.0], "bfloat16": [seconds] * 3})
        with Results(None, {}, {}) as results:
            return bench(results, **options).dtypes()

    assert dtypes(0.25) == [torch.float32, torch.bfloat16]
    assert capsys.readouterr().err == ""
    assert dtypes(3.0) == [torch.float32]
    assert "3.0 times as long" in capsys.readouterr().err
    assert dtypes(3.0, dtype="bfloat16") == [torch.bfloat16]  # asked for by name

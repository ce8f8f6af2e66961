"""Phase 6's bench: bursts of requests are rows, tables follow from them, and the crossover follows from step times."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import phase6
from common.results import Results, Row
from phase6.cost_model import CostModel
from tests.support.forked import run

CPU = torch.device("cpu")
FOLDER = Path(phase6.__file__).resolve().parents[1]
Part = Callable[[int, str], ModuleType]


def lab_of(runs: ModuleType, results: Results, **options: Any) -> Any:
    sizes = {"model": "stdlib-1m", "draft": "stdlib-1m", "requests": [2], "max_tokens": 8, "rounds": 1}
    chosen = {**sizes, "formats": ["float32"], "device": "cpu", **options}
    return runs.Lab(runs.Options(**chosen), results, CPU)


def test_requests_that_arrive_together_are_rows_with_the_tokens_of_all(bench_part: Part) -> None:
    """The speed-up of a table is that of its rows; scheduling is counted by step."""
    runs, requests = bench_part(6, "runs"), bench_part(6, "requests")
    with Results(None, {}, {}, {}, False) as results:
        lab = lab_of(runs, results)
        requests.measure_sampled(lab)
        rows, table = [row for row in results.rows if row.kind == "run"], lab.table("sampled")
    assert [row.status for row in rows] == ["ok"] * 5
    assert {row.tokens for row in rows} == {float(sum(runs.lengths(2, 8)))}
    seconds = {row.variant: row.seconds or 0.0 for row in rows}
    found = {line["variant"]: line.get("speedup") for line in table}
    for name in ("continuous", "continuous, speculative"):
        assert found[name] == pytest.approx(seconds["one at a time"] / seconds[name])
    for row in rows:
        assert row.figures["tokens_per_forward"] == 1 or "speculative" in row.variant
        assert 0 < row.figures["schedule_us_per_step"] <= row.figures["schedule_us"] * row.figures["calls"]


def test_the_crossover_follows_from_step_times(bench_part: Part) -> None:
    """A forward takes 1 ms up to 8 tokens, and 1 ms more for every 8; a draft token of all rows takes 0.05 ms."""
    crossover = bench_part(6, "crossover")
    costs = CostModel()
    for size in (1, 8, 80):
        costs.verify.observe(size, max(1.0, size / 8))
    costs.plain.observe(1, 1.0)
    costs.plain.observe(8, 1.0)
    costs.draft.observe(1, 0.05)
    costs.accept.observe(1, 0.0)
    gains = [crossover.gain(costs, rows, 4, 3.0) for rows in (1, 2, 4, 8)]
    assert gains == pytest.approx([3 / 1.2, 3 / 1.45, 3 / 2.7, 3 / 5.2])
    assert 4 < crossover.crossing((1, 2, 4, 8), gains) < 5
    assert crossover.crossing((1, 2), gains[:2]) is None
    assert crossover.crossing((1, 4), (1.5, 0.5)) == pytest.approx(2)


def test_a_batch_with_drafts_is_predicted_and_measured(bench_part: Part, tmp_path: Path) -> None:
    runs, crossover = bench_part(6, "runs"), bench_part(6, "crossover")
    with Results(None, {}, {}, {}, False) as results:
        lab = lab_of(runs, results, quick=True)
        crossover.measure_crossover(lab)
        rows = [row for row in results.rows if row.kind == "run" and row.variant == crossover.DRAFTED]
        crossover.draw_crossover(lab, tmp_path / "crossover.png")
        assert [line["format"] for line in crossover.crossings(lab)] == ["float32"]
    assert [(row.cell["rows"], row.status) for row in rows] == [(1, "ok"), (2, "ok"), (4, "ok")]
    assert all(row.figures["predicted"] > 0 for row in rows)
    assert (tmp_path / "crossover.png").is_file()


@pytest.mark.parametrize("arguments", [["--dry-run"], pytest.param([], marks=pytest.mark.slow)])
def test_the_last_line_of_a_quick_bench_follows_from_its_rows(arguments: list[str], tmp_path: Path) -> None:
    command = [sys.executable, "bench.py", "--quick", "--device", "cpu", "--output", str(tmp_path), *arguments]
    done = run(command, cwd=FOLDER)
    assert done.returncode == 0, done.stderr
    tables = json.loads(done.stdout.splitlines()[-1])["tables"]
    assert list(tables) == ["requests", "sampled", "crossover", "prefix", "overlap", "parallel"]
    rows = [Row(**json.loads(line)) for line in (tmp_path / "results.jsonl").read_text(encoding="utf-8").splitlines()]
    for section, lines in tables.items():
        for line in lines:
            mine = [
                row
                for row in rows
                if (row.kind, row.section, row.variant) == ("run", section, line["variant"])
                and all(line[name] == value for name, value in row.cell.items())
            ]
            seconds, tokens = sum(row.seconds or 0 for row in mine), sum(row.tokens or 0 for row in mine)
            assert line["tokens_per_s"] == pytest.approx(tokens / seconds, rel=1e-3)
            logs = [math.log(seconds_of(rows, row, row.baseline) / seconds_of(rows, row, row.variant)) for row in mine]
            if "speedup" in line:
                assert line["speedup"] == pytest.approx(math.exp(sum(logs) / len(logs)), rel=1e-3)


def seconds_of(rows: list[Row], like: Row, variant: str | None) -> float:
    """Return the seconds per token of a variant in the same round; without a variant, of the row itself."""
    same = [r for r in rows if (r.kind, r.section, r.cell, r.round) == ("run", like.section, like.cell, like.round)]
    row = next(row for row in same if row.variant == (variant or like.variant))
    return (row.seconds or 0) / (row.tokens or 1)


def test_without_llama_cpp_the_comparison_says_why(bench_part: Part, monkeypatch: pytest.MonkeyPatch) -> None:
    runs, peers = bench_part(6, "runs"), bench_part(6, "peers")
    monkeypatch.setattr(peers.llama_cpp, "why_not", lambda: "llama-cpp-python is not installed")
    with Results(None, {}, {}, {}, False) as results:
        peers.measure_peers(lab_of(runs, results))
        (row,) = results.rows
    assert (row.status, row.variant, row.reason) == ("refused", "llama.cpp f32", "llama-cpp-python is not installed")

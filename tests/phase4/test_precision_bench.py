"""bench.py: its grid, its refusals, and the contents of its rows."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from common.benchmark import Results
from common.phases import phases
from common.results import Row, read_rows
from tests.support import forked

FOLDER = next(phase.folder for phase in phases() if phase.number == 4)


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    return forked.run([sys.executable, FOLDER / "bench.py", *arguments])


def of(rows: list[Row], section: str) -> list[Row]:
    return [row for row in rows if row.section == section and row.kind != "end"]


@pytest.fixture
def part(bench_part: Callable[[int, str], ModuleType]) -> Callable[[str], ModuleType]:
    """Import a file of benchmarks/, as in `part("speed")`."""
    return lambda name: bench_part(4, name)


@pytest.mark.slow
def test_a_dry_run_walks_the_whole_grid_and_draws_it(tmp_path: Path) -> None:
    run = bench("--dry-run", "--output", str(tmp_path))
    assert run.returncode == 0, run.stderr[-2000:]
    document = json.loads(run.stdout.splitlines()[-1])
    rows = read_rows(tmp_path)
    sections = {"choice", "speed", "quality", "memory", "tokenizer", "tokenizer_limit", "profile", "trace", "shapes"}
    assert sections <= document["tables"].keys()
    assert all(row.synthetic for row in rows if row.kind != "end")
    assert {row.cell["temperature"] for row in of(rows, "speed")} == {0.0, 1.0}
    greedy = {row.variant for row in of(rows, "speed") if row.cell["temperature"] == 0}
    assert {"phase 3 plain", "phase 3 plain, again", "int4 drafted", "float32 compiled plain"} <= greedy
    sampled = [row for row in of(rows, "speed") if row.cell["temperature"] == 1]
    assert len({row.prompt for row in sampled}) == 50
    assert {f"phase {n} plain" for n in (1, 2, 3, 4)} <= {row.variant for row in of(rows, "profile")}
    assert {"speed.png", "quality.png", "profile.png", "tables.csv"} <= {file.name for file in tmp_path.iterdir()}


@pytest.mark.slow
def test_the_users_prompts_are_timed_against_the_same_way_to_decode(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(
        "".join(json.dumps({"prompt": f"import {name}\n"}) + "\n" for name in ("os", "re", "json", "io"))
    )
    grid = ["--only", "speed", "--temperatures", "0", "--settings", "float32", "--drafters", "model"]
    size = ["--rounds", "1", "--max-tokens", "8", "--prompts-from", str(prompts)]
    run = bench(*grid, *size, "--output", str(tmp_path / "out"))
    assert run.returncode == 0, run.stderr[-2000:]
    rows = of(read_rows(tmp_path / "out"), "speed")
    assert {row.prompt for row in rows} == {"line-2", "line-4"}  # the others are rows of the choice
    assert all(row.status == "ok" and row.tokens == row.figures["agreed"] for row in rows)
    baselines = {row.variant: row.baseline for row in rows}
    assert baselines["float32 plain"] == "phase 3 plain"
    assert baselines["float32 drafted"] == "phase 3 drafted"
    assert all(row.figures["drafter"] == "model chain 4" for row in rows if row.variant.endswith("drafted"))


@pytest.mark.parametrize(
    "wrong",
    [
        ["--settings", "int3"],
        *(
            pytest.param(each, marks=pytest.mark.slow)
            for each in (["--temperatures", "-1"], ["--k", "0"], ["--resume"])
        ),
    ],
)
def test_wrong_input_gets_one_line(wrong: list[str]) -> None:
    run = bench(*wrong)
    assert run.returncode == 2
    assert run.stderr.startswith("error: ")
    assert run.stderr.count("\n") == 1


def test_slow_bfloat16_is_a_row_with_the_reason(part: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    runs, speed = part("runs"), part("speed")
    monkeypatch.setattr(runs.Lab, "no_bfloat16", "too slow")
    options = runs.Options(dry_run=True, prompts=2, only=["speed"], temperatures=[0.0])
    lab = runs.Lab(options, Results(None, {}, {}), torch.device("cpu"))
    speed.measure_speed(lab)
    rows = of(lab.results.rows, "speed")
    refused = {row.variant: row.reason for row in rows if row.status == "refused"}
    assert refused == dict.fromkeys(("float32 autocast", "bfloat16", "bfloat16 compiled", "int8 bfloat16"), "too slow")
    assert {"int8 plain", "int8 drafted"} <= {row.variant for row in rows}
    assert lab.close() == 0


def test_agreement_ends_with_the_first_other_token(part: Any) -> None:
    agreed = part("speed").agreed
    assert [agreed([1, 2, 3], [1, 2, 3]), agreed([1, 9, 3], [1, 2, 3]), agreed([1, 2, 3], [1, 2])] == [3, 1, 2]

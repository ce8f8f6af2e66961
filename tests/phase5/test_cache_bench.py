"""Phase 5's bench: runs are rows, counts add up, and plain decoding is compared with itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from common.results import Results

CPU = torch.device("cpu")
Part = Callable[[int, str], ModuleType]


def lab_of(runs: ModuleType, results: Results, **options: Any) -> Any:
    return runs.Lab(runs.Options(prompts=2, max_tokens=8, rounds=1, device="cpu", **options), results, CPU)


def test_a_run_of_one_prompt_is_a_row_with_counts(bench_part: Part) -> None:
    runs, speed = bench_part(5, "runs"), bench_part(5, "speed")
    with Results(None, {}, {}, {}, False) as results:
        speed.measure_speed(lab_of(runs, results, temperatures=[0.0], drafters=["ngram"]))
        rows = [row for row in results.rows if row.kind == "run"]
    assert [row.status for row in rows] == ["ok"] * 6  # plain, plain again, ngram; two prompts
    assert {row.variant for row in rows} == {"plain", "plain, again", "ngram, cost"}
    for row in rows:
        assert 1 <= row.figures["forwards"] <= 9
        assert row.tokens is not None
        assert row.figures.get("accepted", 0) <= row.figures.get("proposed", 0)


def test_the_null_bench_says_what_it_found(bench_part: Part) -> None:
    runs, speed = bench_part(5, "runs"), bench_part(5, "speed")
    with Results(None, {}, {}, {}, False) as results:
        lab = lab_of(runs, results, tries=3, dry_run=True)
        speed.measure_null(lab)
        verdicts = speed.null_verdicts(lab)
        assert {row.cell["try"] for row in results.rows} == {0, 1, 2}
    assert len(verdicts) == 6
    assert not any("; a claim" in verdict for verdict in verdicts)


@pytest.mark.parametrize("tokens", [512, pytest.param(1024, marks=pytest.mark.slow)])
def test_perplexity_is_counted_window_by_window(tokens: int, bench_part: Part) -> None:
    runs, quality = bench_part(5, "runs"), bench_part(5, "quality")
    with Results(None, {}, {}, {}, False) as results:
        lab = lab_of(runs, results, tokens=tokens)
        windows = quality.heldout(lab)
        quality.by_window(lab, "quality", {}, {n: quality.of_cache(lab, n) for n in ("float32", "int8")}, windows)
        exact, int8 = lab.table("quality")
    assert len(results.rows) == 2 * tokens * 2 // 512
    assert int8["nll_more"] == pytest.approx(int8["nll"] - exact["nll"])
    assert exact["nll_more"] == 0


def test_pictures_are_drawn_from_a_dry_run(bench_part: Part, tmp_path: Path) -> None:
    runs, verification, pictures = (bench_part(5, name) for name in ("runs", "verification", "pictures"))
    with Results(None, {}, {}, {}, False) as results:
        lab = lab_of(runs, results, dry_run=True)
        verification.measure_verification(lab)
        pictures.draw(lab, tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["verification.png"]

"""A prediction follows from rows alone: mean step times, counted steps, and an interval with three parts."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import pytest

from common.phases import ROOT
from common.prompts import Prompt
from common.results import Row, read_rows
from common.tables import AGAIN
from tests.support.beside import beside

predict = beside(7, "instruments.predict")
cell = beside(7, "instruments.cell")
grid = beside(7, "instruments.grid")
CELL: dict[str, Any] = {"temperature": 1.0}


def timed(
    section: str, variant: str, prompt: int, round_: int, first: float, step: float, forwards: int, tokens: int
) -> Row:
    figures = {"ttft_ms": 1e3 * first, "later_ms": 1e3 * step * (forwards - 1), "forwards": forwards}
    return Row(
        kind="run", section=section, cell=CELL, variant=variant, prompt=str(prompt), round=round_, order=0,
        baseline=None if variant == "plain" else "plain", seconds=first + step * (forwards - 1), tokens=float(tokens),
        figures=figures,
    )  # fmt: skip


def counted(variant: str, prompt: int, forwards: int, accepted: int, drafts: int, survived: list[int]) -> Row:
    figures = {"forwards": forwards, "accepted": accepted, "drafts": drafts, "survived": survived}
    return Row(
        kind="count", section="survival", cell=CELL, variant=variant, prompt=str(prompt), tokens=20.0, figures=figures
    )


def machine(noise: float = 0.0, seed: int = 0) -> list[Row]:
    """Return rows of a machine on which a plain step takes 10 ms, one with drafts 15 ms, and a prompt 30 ms."""
    draw = random.Random(seed)

    def shaken(value: float) -> float:
        return value * math.exp(draw.gauss(0, noise))

    rows = []
    for prompt in range(6):
        for round_ in range(5):
            rows.append(timed("cost", "plain", prompt, round_, 0.04, shaken(0.010), 20, 20))
            rows.append(timed("cost", "k=2", prompt, round_, 0.045, shaken(0.015), 9, 20))
    return rows


@pytest.mark.about("instruments/predict.py, cost")
def test_a_prediction_is_the_ratio_of_two_times_of_a_text() -> None:
    """A text of 20 tokens in 8 steps: (30 + 20 x 10) / (30 + 8 x 15) ms."""
    rows = machine() + [counted("k=2", at, 8, 12, 8, [7, 5]) for at in range(10)]
    (found,) = predict.estimates(rows, CELL).values()
    assert found["predicted"] == pytest.approx((0.04 + 19 * 0.010) / (0.045 + 7 * 0.015))
    assert found["step_ms"] == pytest.approx(15)
    assert found["predicted_tokens_per_forward"] == 2.5
    drift = predict.Z * predict.DRIFT  # nothing else varies
    assert math.log(found["predicted_high"] / found["predicted"]) == pytest.approx(drift)


def test_the_interval_grows_with_prompts_that_differ_and_with_noise() -> None:
    same = [counted("k=2", at, 8, 12, 8, [7, 5]) for at in range(10)]
    differ = [counted("k=2", at, 6 + at % 5, 12, 8, [7, 5]) for at in range(10)]
    width = []
    for noise, texts in ((0.0, same), (0.2, same), (0.0, differ)):
        (found,) = predict.estimates(machine(noise) + texts, CELL).values()
        width.append(math.log(found["predicted_high"] / found["predicted"]))
    assert width[0] < width[1]
    assert width[0] < width[2]


def test_an_interrupted_run_weighs_as_in_the_measured_ratio() -> None:
    """A geometric mean over runs; a text of one step has no later one."""
    rows = [timed("cost", "plain", at, 0, 0.04, 0.08 if at == 3 else 0.01, 1 if at == 5 else 20, 20) for at in range(6)]
    found = predict.cost(rows)
    assert found.first == pytest.approx(0.04)
    assert found.step == pytest.approx(0.01 * 8 ** (1 / 5))


def test_prompts_of_all_lengths_are_timed() -> None:
    prompts = [Prompt(str(length), "code", "test", length * "x", "", "") for length in (9, 1, 8, 2, 7, 3, 6, 4, 5, 10)]
    assert [len(prompt.text) for prompt in predict.of_all_lengths(prompts, 5)] == [2, 4, 6, 8, 10]
    assert len(predict.of_all_lengths(prompts, 20)) == 10


@pytest.mark.about("instruments/predict.py, rate")
def test_the_rate_is_the_chance_after_accepted_tokens() -> None:
    """8 drafts of 2: 7 first tokens accepted, 5 second ones. 12 accepted, 3 rejected."""
    assert predict.rate([counted("k=2", 0, 8, 12, 8, [7, 5])]) == 12 / 15
    assert predict.rate([]) == 0


def test_predictions_are_joined_with_what_was_measured() -> None:
    rows = machine() + [counted("k=2", at, 8, 12, 8, [7, 5]) for at in range(10)]
    figures = predict.estimates(rows, CELL)["k=2"]
    rows.append(Row(kind="count", section="prediction", cell=CELL, variant="k=2", figures=figures))
    for prompt in range(6):
        for name, forwards, step in (("plain", 20, 0.01), ("plain" + AGAIN, 20, 0.01), ("k=2", 8, 0.016)):
            rows.append(timed("sweep", name, prompt, 0, 0.04, step, forwards, 20))
    (line,) = predict.compared(rows)
    assert line["measured"] == pytest.approx((0.04 + 0.19) / (0.04 + 7 * 0.016))
    assert line["error"] == pytest.approx(line["predicted"] / line["measured"] - 1)
    assert line["tokens_error"] == pytest.approx(0)
    found = predict.verdict([line, {**line, "error": 0.5, "inside": False}])
    assert (found["predicted_cells"], found["inside"], found["error_p90"]) == (2, 0.5, 0.5)
    assert predict.verdict([]) == {"predicted_cells": 0}


@pytest.mark.parametrize(("results", "count"), [("results", 3), ("results/avx512", 2)])
def test_the_readme_says_how_good_the_predictions_were(results: str, count: int) -> None:
    folder = ROOT / "phase-7-bench"
    readme = " ".join((folder / "README.md").read_text(encoding="utf-8").split())
    said = predict.sentences(predict.compared(read_rows(folder / results)))
    assert len(said) == count
    assert all(sentence in readme for sentence in said), said


def test_the_drift_is_that_of_the_measured_cells() -> None:
    """Estimated again from the committed rows, 90% of the cells are inside their intervals, and not nearly all."""
    cells = [{"temperature": t, "dtype": dtype} for t in (0.0, 1.0) for dtype in ("float32", "bfloat16")]
    lines = []
    for results in ("results", "results/avx512"):
        rows = read_rows(ROOT / "phase-7-bench" / results)
        measured = [line for line in predict.compared(rows) if "synthetic" not in line["variant"]]
        assert len(measured) == 60
        for cell in cells:
            found = predict.estimates([row for row in rows if row.cell == cell], cell)
            for line in (line for line in measured if cell.items() <= line.items()):
                low, high = (found[line["variant"]][f"predicted_{end}"] for end in ("low", "high"))
                lines.append({**line, "inside": low <= line["measured"] <= high})
    assert len(lines) == 120
    assert 0.9 <= predict.verdict(lines)["inside"] < 0.99


def test_a_cell_is_surveyed_on_the_other_half_before_it_is_measured(llama_folder: Path) -> None:
    settings = {"model": str(llama_folder), "temperature": 0.0, "dtype": "float32"}
    task = cell.Task(grid.Cell(settings, {"plain": {"draft": "none"}, "k=2": {"drafter": "ngram", "k": 2}}), {}, "test")
    options = cell.BenchOptions(device="cpu", prompts=2, max_tokens=6, threads=1)
    bench = cell.Bench(options, cell.Results(None, {}, {}), cell.resolve_device("cpu"))
    predict.survey(bench, task)
    rows = bench.results.rows
    assert {row.section for row in rows} == {"survival", "cost", "prediction"}
    other = {prompt.id for prompt in bench.prompts(half="calibrate")}
    assert {row.prompt for row in rows if row.prompt is not None} <= other
    forced = [row for row in rows if row.section == "cost" and row.variant == "k=2"]
    assert all(row.status == "ok" and "synthetic_acceptance" in row.figures for row in forced)
    (prediction,) = [row for row in rows if row.section == "prediction"]
    assert prediction.figures["predicted_low"] < prediction.figures["predicted"] < prediction.figures["predicted_high"]


@pytest.mark.about("instruments/predict.py, rate")
def test_a_synthetic_loop_has_the_acceptance_that_was_asked_for(llama_folder: Path) -> None:
    models = cell.Models({"model": str(llama_folder), "max_tokens": 40, "device": "cpu", "dtype": "float32"}, {})
    llm = models.llm({"draft": str(llama_folder), "k": 2, "synthetic_acceptance": 0.7})
    bench = cell.Bench(
        cell.BenchOptions(device="cpu", prompts=8), cell.Results(None, {}, {}), cell.resolve_device("cpu")
    )
    runs = [cell.decode(llm, prompt, 0) for prompt in bench.prompts()]
    rows = [Row(kind="count", section="s", tokens=run.tokens, figures=dict(run.figures)) for run in runs]
    assert predict.rate(rows) == pytest.approx(0.7, abs=0.12)

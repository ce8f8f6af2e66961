"""What steps cost is measured before the first draft, and kept for this machine, these models and settings."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import phase5
from common.prompts import load_prompts
from phase5.cost_model import START, CostModel
from phase5.prices import DAY, SECONDS, Measured, Prices

pytestmark = pytest.mark.no_exercise  # part draft is given
TIMES = {
    "plain": {1: 2.0, 4: 3.0},
    "verify": {2: 2.5, 20: 9.0},
    "draft": {1: 0.5, 4: 0.75},
    "accept": {1: 0.1, 4: 0.2},
}


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "llm-inference-lab/prices.json"


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Replace measuring by known times; returns the numbers of rows that were measured."""
    rows = list[int]()

    def measure(self: Prices, params: Any, count: int) -> CostModel:
        rows.append(count)
        model = CostModel()
        for name, table in model.tables.items():
            for size, value in TIMES[name].items():
                table.observe(size, value)
        return model

    monkeypatch.setattr(Prices, "measure", measure)
    return rows


def llm(**options: Any) -> phase5.LLM:
    chosen = {"model": "fake", "draft": "fake", "controller": "cost", "max_tokens": 8, **options}
    return phase5.LLM(phase5.Options(**chosen))


def provided(made: phase5.LLM, rows: int = 1) -> dict[str, dict[int, float]]:
    made.prices.provide(made.cost_model, made.params, rows)
    return {name: table.usual() for name, table in made.cost_model.tables.items()}


def test_times_are_measured_once_per_machine_and_setting(kept: Path, measured: list[int]) -> None:
    assert provided(llm()) == TIMES
    made = llm()
    assert provided(made) == provided(made) == TIMES
    assert measured == [1]
    provided(llm(), rows=7)
    assert measured == [1, 4]  # the largest power of two up to 7
    for other in ({"temperature": 1.0}, {"drafter": "ngram"}, {"kv": "off"}):
        provided(llm(**other))
    assert measured == [1, 4, 1, 1, 1]


def test_another_machine_measures_anew(kept: Path, measured: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    provided(llm())
    monkeypatch.setattr("phase5.prices.cpu_name", lambda: "another processor")
    provided(llm())
    assert measured == [1, 1]
    assert len(json.loads(kept.read_text())) == 2  # nothing is lost


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "",
        lambda text: text[: len(text) // 2],
        lambda text: "[1, 2]",
        lambda text: text.replace("2.5", '"a"'),
        lambda text: text.replace("2.5", "NaN"),
        lambda text: text.replace("2.5", "-1"),
        lambda text: text.replace('"verify"', '"verified"'),
        lambda text: text.replace('"20"', '"x"'),
        lambda text: text.replace('"at"', '"on"'),
    ],
)
def test_a_damaged_file_is_measured_anew(kept: Path, measured: list[int], damage: Callable[[str], str]) -> None:
    provided(llm())
    kept.write_text(damage(kept.read_text()))
    assert provided(llm()) == TIMES
    assert measured == [1, 1]
    provided(llm())
    assert measured == [1, 1]  # it was repaired


def test_old_times_are_measured_anew(kept: Path, measured: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    provided(llm())
    later = time.time() + DAY + 1
    monkeypatch.setattr("phase5.prices.time.time", lambda: later)
    provided(llm())
    assert measured == [1, 1]


def test_where_nothing_can_be_written_it_measures(measured: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null/none")
    assert provided(llm()) == provided(llm()) == TIMES
    assert measured == [1, 1]


def test_after_a_change_of_plain_steps_it_measures_again_but_not_always(kept: Path, measured: list[int]) -> None:
    provided(llm())
    made = llm()
    provided(made)
    for _ in range(9):
        made.cost_model.plain.observe(1, 4.0)
    provided(made)
    assert measured == [1]  # nothing was decoded yet
    assert made.prices.measured[1].took >= SECONDS  # those of the file were measured as well
    made.cost_model.spent = 101 * SECONDS * 1e3 / START
    assert provided(made) == TIMES
    assert measured == [1, 1]
    for decoded, times in ((10.0, 2), (30.0, 3)):  # seconds of decoding after 0.2 s of measuring
        made.prices.measured[1] = Measured(TIMES, at=15.0, took=0.2)
        made.cost_model.spent = (15.0 + decoded) * 1e3 / START
        for _ in range(9):
            made.cost_model.plain.observe(1, 4.0)
        provided(made)
        assert measured == [1] * times


@pytest.mark.parametrize("options", [{"draft": "none"}, {"controller": "fixed"}])
def test_runs_without_a_choice_measure_nothing(kept: Path, measured: list[int], options: dict[str, Any]) -> None:
    llm(**options).generate(["a"])
    assert (measured, kept.exists()) == ([], False)


@pytest.mark.parametrize(
    "how", ["model", "eagle", *(pytest.param(how, marks=pytest.mark.slow) for how in ("ngram", "medusa"))]
)
def test_measuring_gives_every_time_and_leaves_texts_as_they_are(how: Any, kept: Path) -> None:
    options = phase5.Options(drafter=how, controller="cost", policy="coupled", temperature=1.0, max_tokens=12)
    made = phase5.LLM(options)
    model = made.prices.measure(made.params, 2)
    assert model.known
    assert model.plain.recent.keys() == model.accept.recent.keys() == {2}
    assert min(model.verify.recent) > 2
    assert model.draft.recent.keys() <= {1, 2}
    texts = [prompt.text for prompt in load_prompts("code")[:2]]
    plain = phase5.LLM(phase5.Options(draft="none", temperature=1.0, max_tokens=12))
    assert [each.tokens for each in made.generate(texts)] == [each.tokens for each in plain.generate(texts)]

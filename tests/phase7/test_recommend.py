"""A recommendation: candidates that are behind leave, the best stays, and a loss is called a loss."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from common.benchmark import Outcome
from common.errors import UserError
from common.prompts import Prompt
from common.results import Results, Row
from tests.support.beside import beside

recommend = beside(7, "instruments.recommend")
PROMPT = Prompt("p", "own", "test", "text", "", "")


def racer(seconds: float, draw: random.Random) -> Any:
    return lambda prompt, round_: Outcome(10, seconds=seconds * draw.uniform(0.9, 1.1))


@pytest.mark.parametrize("fast", ["b", "plain"])
def test_the_fastest_stays_and_those_far_behind_leave(fast: str) -> None:
    draw = random.Random(1)
    times = {"plain": 2.0, "a": 3.0, "b": 2.6, "c": 4.0, fast: 1.0}
    race = recommend.Race({name: racer(seconds, draw) for name, seconds in times.items()})
    for number in range(8):
        race.round([PROMPT] * 2, number)
        race.drop()
    assert {"plain", "b"} <= set(race.alive())
    assert race.out >= {"a", "c"}


def test_a_candidate_that_cannot_run_leaves_with_its_reason() -> None:
    def bad(prompt: Prompt, round_: int) -> Any:
        raise recommend.UserError("no heads")

    race = recommend.Race({"plain": racer(1.0, random.Random(0)), "bad": bad})
    race.round([PROMPT], 0)
    assert race.alive() == ["plain"]
    assert race.failed == {"bad": "UserError: no heads"}


def test_words_give_flags_or_say_not_to_speculate() -> None:
    line = {"speedup": 1.5, "speedup_low": 1.4, "speedup_high": 1.6, "claimed": True}
    advice = {"name": "k=2", "setting": {"k": 2, "drafter": "ngram"}, "line": line, "prompts": 9, "speculate": True}
    assert recommend.words(advice) == (
        "Use --k 2 --drafter ngram: 1.50 [1.40, 1.60] times as fast as plain decoding, on 9 other prompts."
    )
    lost = {**advice, "speculate": False, "line": {**line, "speedup": 0.8, "speedup_low": 0.7, "speedup_high": 0.9}}
    assert recommend.words(lost).startswith("Do not speculate here: the best candidate, k=2, is 0.80 [0.70, 0.90]")
    assert "no candidate could run" in recommend.words({"speculate": False})


def test_the_candidates_are_the_drafters_that_the_model_has() -> None:
    found = recommend.candidates(recommend.RecommendOptions())
    assert {settings["drafter"] for settings in found.values()} == {"model", "ngram", "medusa", "eagle"}
    assert found["drafter=model, controller=cost"]["controller"] == "cost"
    alone = recommend.candidates(recommend.RecommendOptions(model="stdlib-1m", draft="none"))
    assert {settings["drafter"] for settings in alone.values()} == {"ngram"}


def test_the_recommended_setting_is_compared_with_the_best_of_a_sweep(tmp_path: Path) -> None:
    fixed = [("model", 2, "fixed", 1.0), ("model", 4, "fixed", 0.5), ("ngram", 2, "fixed", 2.0)]
    settings = [*fixed, ("model", 4, "cost", 0.8)]
    with Results(tmp_path, {}, {}, {}) as results:
        for drafter, k, controller, seconds in settings:
            for name, took in (("plain", 1.0), (f"{drafter} {k} {controller}", seconds)):
                row = Row(kind="run", section="sweep", cell={"temperature": 1.0}, variant=name, prompt="p", round=0)
                how = {} if name == "plain" else {"drafter": drafter, "k": k, "controller": controller}
                found = {"seconds": took, "tokens": 1.0, "figures": how, "baseline": "plain" if how else None}
                if not results.has(row):
                    results.add(row.model_copy(update=found))
    chosen = {"name": "k=2", "speculate": True, "setting": {"drafter": "model", "k": 2}}
    found = recommend.behind(tmp_path, chosen, 1.0)
    assert (found["best"], found["ahead"]) == ("model 4 fixed", pytest.approx(2))
    cost = {**chosen, "setting": {"drafter": "model", "controller": "cost"}}
    assert recommend.behind(tmp_path, cost, 1.0)["ahead"] == pytest.approx(1.6)
    assert recommend.behind(tmp_path, {"speculate": False}, 1.0)["ahead"] == pytest.approx(2)
    with pytest.raises(UserError, match="did not measure the recommended setting"):
        recommend.behind(tmp_path, {**chosen, "setting": {"drafter": "eagle", "k": 2}}, 1.0)


@pytest.mark.slow
def test_a_model_is_measured_to_its_end(llama_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = f"--model {llama_folder} --draft none --seconds 8 --max-tokens 8 --device cpu --dtype float32 --prompts 6"
    assert recommend.run(command.split()) == 0
    out = capsys.readouterr().out
    assert ("Use --drafter ngram" in out) or ("Do not speculate here" in out)

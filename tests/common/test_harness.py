"""A bench's comparisons: every run a row, rounds until enough, exact variants, failures, resuming after a kill."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from common.benchmark import BenchOptions, Outcome
from common.errors import UserError
from common.harness import Bench, Variant, open_results
from common.phases import ROOT
from common.prompts import Prompt
from common.results import Results, read_rows
from tests.support import forked

CPU = torch.device("cpu")
PROMPTS = [Prompt(f"p{number}", "own", "test", "text", "", "") for number in range(3)]


def bench(results: Results, **options: Any) -> Bench:
    return Bench(BenchOptions(**options), results, CPU)


def taking(seconds: float, **fields: Any) -> Variant:
    return lambda prompt, round_: Outcome(10, seconds=seconds, **fields)


def test_every_run_is_a_row_and_the_baseline_is_its_own_null_arm() -> None:
    with Results(None, {}, {}) as results:
        made = bench(results, rounds=2)
        runs = {"plain": taking(2.0), "fast": taking(1.0, figures={"forwards": 5})}
        made.compare("speed", {"k": 4}, runs, PROMPTS)
        rows = made.rows("speed")
        timed = [row for row in rows if row.kind == "run"]
        assert Counter(row.variant for row in timed) == {"plain": 6, "plain, again": 6, "fast": 6}
        assert {(row.prompt, row.round) for row in timed} == {(p.id, r) for p in PROMPTS for r in (0, 1)}
        assert {row.baseline for row in timed if row.variant != "plain"} == {"plain"}
        for prompt in PROMPTS:  # the variants of one prompt run in turns, in a changing order
            orders = [[row.variant for row in timed if (row.prompt, row.round) == (prompt.id, r)] for r in (0, 1)]
            assert orders[0] != orders[1]
            assert [row.order for row in timed if (row.prompt, row.round) == (prompt.id, 0)] == [0, 1, 2]
        lines = {line["variant"]: line for line in made.table("speed")}
        assert list(lines) == ["plain", "plain, again", "fast"]
        assert lines["fast"]["speedup"] == pytest.approx(2.0)
        assert lines["plain, again"]["speedup"] == pytest.approx(1.0)
        assert lines["fast"]["tokens_per_forward"] == 2.0
        assert lines["fast"]["tokens_per_s"] == pytest.approx(10.0)
        before = len(results.rows)
        made.compare("speed", {"k": 4}, {"plain": fail, "fast": fail}, PROMPTS)  # complete: nothing runs again
        assert len(results.rows) == before


def fail(prompt: Prompt | None, round_: int) -> Outcome:
    raise RuntimeError("out of memory\nin two lines")


def test_rounds_are_added_until_the_precision_or_the_budget_is_reached() -> None:
    def rounds(noise: float, **options: Any) -> int:
        dice = random.Random(0)

        def noisy(prompt: Prompt | None, round_: int) -> Outcome:
            return Outcome(10, seconds=2.0 * (1 + noise * dice.random()))

        with Results(None, {}, {}) as results:
            made = bench(results, **options)
            made.compare("s", {}, {"a": noisy, "b": noisy})
            return int(made.table("s")[0]["n_rounds"])

    assert rounds(0.0) == 5  # never fewer, however well the ratio is known
    assert 5 < rounds(0.2, precision=0.05, budget=1e6) < rounds(0.2, precision=0.03, budget=1e6)
    assert rounds(0.2, precision=1e-9, budget=100) == 14  # about 6.9 s a round
    assert rounds(0.2, rounds=7) == 7
    assert rounds(0.2, quick=True) == 2


def test_a_budget_too_short_for_a_round_says_how_long_one_takes() -> None:
    with Results(None, {}, {}) as results:

        def slow(prompt: Prompt | None, round_: int) -> Outcome:
            time.sleep(0.2)
            return Outcome()

        with pytest.raises(UserError, match=r"--budget 0.1: one round of s  takes about \d+ s") as refused:
            bench(results, budget=0.1).compare("s", {}, {"a": slow}, PROMPTS)
        said = re.search(r"about (\d+) s", str(refused.value))
        assert said is not None
        assert 2 <= int(said[1]) < 20  # 1.2 s, rounded up, and more beside other work


def test_a_default_budget_allows_one_round_at_least_and_a_share_of_it_is_no_wish() -> None:
    with Results(None, {}, {}) as results:
        made = bench(results).with_options(budget=1e-9)
        made.compare("s", {}, {"a": taking(1.0), "b": taking(1.0)}, PROMPTS)
        assert made.table("s")[0]["n_rounds"] == 1


def test_a_failing_variant_is_a_row_with_its_reason_and_the_grid_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    with Results(None, {}, {}) as results:
        made = bench(results, rounds=5)
        made.compare("s", {}, {"a": taking(1.0), "b": fail, "c": taking(1.0)}, PROMPTS)
        failed = [row for row in made.rows("s") if row.status != "ok"]
        assert [(row.variant, row.status, row.reason) for row in failed] == [
            ("b", "failed", "RuntimeError: out of memory in two lines")
        ]
        assert {line["variant"] for line in made.table("s") if "speedup" in line} == {"a, again", "c"}
        made.report("s", "S")
        assert "left out: s {} b: failed: RuntimeError: out of memory in two lines" in capsys.readouterr().out
        assert made.close() == 1


def test_a_variant_with_other_output_than_the_baselines_is_refused() -> None:
    def changing(prompt: Prompt | None, round_: int) -> Outcome:
        return Outcome(1, output=[1, 2, 3 if round_ < 3 else 4], seconds=1.0)

    with Results(None, {}, {}) as results:
        made = bench(results, rounds=5)
        base = taking(1.0, output=[1, 2, 3])
        made.compare("s", {}, {"a": base, "late": changing, "free": taking(1.0, output=[9])}, exact=["late"])
        refused = [row for row in made.rows("s") if row.status == "refused"]
        assert [(row.variant, row.round) for row in refused] == [("late", 3)]
        assert "gives token 4 at position 2, expected 3" in (refused[0].reason or "")
        assert made.close() == 1


def test_a_dry_run_calls_nothing_and_its_rows_are_no_real_ones(tmp_path: Path) -> None:
    with Results(tmp_path, {}, {}) as results:
        dry = bench(results, dry_run=True)
        dry.compare("s", {}, {"a": fail, "b": fail}, PROMPTS)
        dry.count("c", {}, "a", None, lambda: fail(None, 0))
        assert dry.finished("s", {})
        assert not bench(results).finished("s", {})
        assert {row.synthetic for row in results.rows} == {True}
        assert (bench(results).mark, dry.mark) == ("", " (synthetic)")
        assert dry.close() == 0


def test_counts_are_rows_and_are_not_repeated() -> None:
    with Results(None, {}, {}) as results:
        made = bench(results)
        for _ in range(2):
            made.count(
                "c", {"t": 1.0}, "K=2", "p0", lambda: Outcome(6, {"forwards": 3, "drafts": 2, "survived": [2, 1]})
            )
            made.count(
                "c", {"t": 1.0}, "K=2", "p1", lambda: Outcome(6, {"forwards": 1, "drafts": 2, "survived": [2, 2]})
            )
            made.refuse("c", {"t": 1.0}, "K=9", "no such K")
        (line, refused) = made.table("c")
        assert (line["tokens_per_forward"], line["survival"], line["n_prompts"]) == (3.0, [1.0, 0.75], 2)
        assert (refused["status"], refused["reason"]) == ("refused", "no such K")
        assert made.close() == 0  # what cannot run here is no failure


def test_bfloat16_is_measured_only_where_it_multiplies_no_slower(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def dtypes(seconds: float, **options: Any) -> list[torch.dtype]:
        found = [("float32", 1.0), ("bfloat16", seconds)]
        table = [{"variant": name, "seconds_per_token": each} for name, each in found]
        monkeypatch.setattr(Bench, "compare", lambda *_: None)
        monkeypatch.setattr(Bench, "table", lambda *_: table)
        with Results(None, {}, {}) as results:
            return bench(results, **options).dtypes()

    assert dtypes(0.25) == [torch.float32, torch.bfloat16]
    assert capsys.readouterr().err == ""
    assert dtypes(3.0) == [torch.float32]
    assert "3.0 times as long" in capsys.readouterr().err
    assert dtypes(3.0, dtype="bfloat16") == [torch.bfloat16]  # asked for by name


SCRIPT = """
import sys, time
from pathlib import Path
import torch
from common.benchmark import BenchOptions, Outcome
from common.harness import Bench, open_results
from common.prompts import Prompt
prompts = [Prompt(f"p{n}", "own", "test", "text", "", "") for n in range(4)]
options = BenchOptions(output=Path(sys.argv[1]), resume="resume" in sys.argv, rounds=5)
def run(prompt, round_):
    time.sleep(0.002)
    return Outcome(1)
with open_results(options, {}, torch.device("cpu"), "float32", {}) as results:
    bench = Bench(options, results, torch.device("cpu"))
    for k in (1, 2, 3):
        bench.compare("s", {"k": k}, {"a": run, "b": run, "c": run}, prompts)
    bench.close()
"""


def _keys(folder: Path) -> list[str]:
    return [row.key for row in read_rows(folder)]


@pytest.mark.parametrize("wanted", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_kill_9_loses_one_run_at_most_and_resume_completes_the_list(tmp_path: Path, wanted: int) -> None:
    whole = tmp_path / "whole"
    forked.run([sys.executable, "-c", SCRIPT, str(whole)], cwd=ROOT, check=True)
    expected, dice = _keys(whole), random.Random(1)
    folder, resume = tmp_path / "killed", list[str]()
    for _ in range(wanted):
        command = [sys.executable, "-c", SCRIPT, str(folder), *resume]
        process = forked.start(command, cwd=ROOT, stderr=subprocess.DEVNULL)
        path, before = folder / "results.jsonl", len(_keys(folder)) if resume else 0
        goal = before + dice.randrange(1, 9)
        while not path.exists() or path.read_bytes().count(b"\n") < goal:
            assert process.poll() is None
            time.sleep(0.001)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        resume = ["resume"]
        assert _keys(folder) == expected[: len(_keys(folder))]  # whole rows, in the order of an uninterrupted run
        assert len(_keys(folder)) >= goal
    forked.run([*command, "resume"], cwd=ROOT, check=True)
    assert _keys(folder) == expected
    assert len(json.loads((folder / "MANIFEST.json").read_text())["invocations"]) == wanted + 1


def test_resume_with_other_options_is_refused(tmp_path: Path) -> None:
    def opened(**options: Any) -> Results:
        chosen = BenchOptions(output=tmp_path, **options)
        return open_results(chosen, {}, CPU, "float32", {})

    opened(prompts=2).close()
    with pytest.raises(UserError, match=r"--prompts 2, this run has 5"):
        opened(prompts=5, resume=True)
    own = tmp_path / "own.txt"
    own.write_text("one")
    with pytest.raises(UserError, match=r"prompt"):
        opened(prompts=2, resume=True, prompt_file=[own])

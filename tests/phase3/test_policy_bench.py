"""bench.py: its grid, its refusals, and its two exact distances."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from common.checkpoint import MODELS
from common.phases import phases
from common.prompts import Prompt
from common.results import read_rows
from tests.support import forked

pytestmark = pytest.mark.no_exercise  # bench.py is given

FOLDER = next(phase.folder for phase in phases() if phase.number == 3)
SECTIONS = {
    "drafters": {"drafters", "forced"},
    "policies": {"policies", "distance"},
    "controllers": {"choice", "controllers"},
    "ngram": {"index"},
    "phases": {"choice", "phases"},
}
EVERY = set().union(*SECTIONS.values())
CHAINS, TREES = {"chain 4"}, {"static 16", "dynamic 16"}


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    return forked.run([sys.executable, FOLDER / "bench.py", *arguments])


def tables_of(run: subprocess.CompletedProcess[str]) -> dict[str, list[dict[str, Any]]]:
    assert run.returncode == 0, run.stderr[-2000:]
    tables: dict[str, list[dict[str, Any]]] = json.loads(run.stdout.splitlines()[-1])["tables"]
    return tables


def variants(lines: list[dict[str, Any]], **cell: Any) -> set[str]:
    return {line["variant"] for line in lines if all(line[name] == value for name, value in cell.items())}


@pytest.fixture
def part(bench_part: Callable[[int, str], ModuleType]) -> Callable[[str], ModuleType]:
    """Import a file of benchmarks/, as in `part("distance")`."""
    return lambda name: bench_part(3, name)


def test_a_dry_run_walks_the_whole_grid_and_goes_on_where_it_ended(tmp_path: Path) -> None:
    output = ("--dry-run", "--prompts", "2", "--output", str(tmp_path))
    assert set(tables_of(bench(*output, "--only", "ngram", "--only", "controllers"))) == {
        "index",
        "choice",
        "controllers",
    }
    begun = read_rows(tmp_path)
    tables = tables_of(bench(*output, "--resume"))
    rows = read_rows(tmp_path)
    assert rows[: len(begun)] == begun
    assert set(tables) == EVERY
    assert all(row.synthetic for row in rows)
    assert len({row.key for row in rows}) == len(rows)
    for section, longest in (("drafters", set()), ("forced", {"chain 8"})):
        for temperature in (0.0, 1.0):
            found = defaultdict(set)
            for variant in variants(tables[section], temperature=temperature) - {"plain", "plain, again"}:
                drafter, _, shape = variant.partition(" ")
                found[drafter].add(shape)
            assert found["model"] == CHAINS | TREES | longest
            assert found["ngram"] == found["extrapolate"] == CHAINS | longest
            assert found["medusa"] == CHAINS | TREES  # there are four heads
    tried = variants(tables["controllers"], draft="own", temperature=1.0)
    assert tried == {"plain", "plain, again", "best fixed K", "adaptive", "confidence", "cost"}
    assert variants(tables["choice"], temperature=1.0) >= {f"model chain {k}" for k in (2, 4, 6, 8)}
    pictures = {"drafters.png", "survival.png", "policies.png", "controllers.png", "tables.csv"}
    assert pictures <= {file.name for file in tmp_path.iterdir()}


def test_own_prompts_and_lists_are_measured_and_what_needs_continuations_says_so(tmp_path: Path) -> None:
    file = tmp_path / "own.jsonl"
    file.write_text("".join(json.dumps({"id": f"own {n}", "prompt": f"def f{n}("}) + "\n" for n in range(4)))
    chosen = ("--drafters", "ngram", "--drafters", "model", "--k", "3", "--nodes", "8", "--temperatures", "0.5")
    options = ("--prompts-from", str(file), "--output", str(tmp_path / "out"), "--dry-run", *chosen)
    tables = tables_of(bench(*options, "--only", "drafters", "--only", "policies"))
    shapes = {"ngram chain 3", "model chain 3", "model static 8", "model dynamic 8"}
    assert variants(tables["drafters"]) == {"plain", "plain, again", *shapes}
    assert {line["temperature"] for line in tables["drafters"] + tables["policies"]} == {0.5}
    for section in ("forced", "distance"):
        assert any("no continuation" in line.get("reason", "") for line in tables[section])
    prompts = {row.prompt for row in read_rows(tmp_path / "out") if row.kind == "run"}
    assert prompts == {"own 1", "own 3"}  # the test half


@pytest.mark.parametrize(
    "wrong",
    [
        ["--calibrate", "--quick"],
        ["--nodes", "65"],
        *(
            pytest.param(wrong, marks=pytest.mark.slow)
            for wrong in (["--only", "everything"], ["--resume"], ["--k", "0"], ["--temperatures", "-1"])
        ),
    ],
)
def test_wrong_input_gets_one_line(wrong: list[str]) -> None:
    run = bench(*wrong)
    assert run.returncode == 2
    assert run.stderr.startswith("error: ")
    assert run.stderr.count("\n") == 1
    assert wrong[0] in run.stderr


def test_a_run_is_one_prompt_with_its_rounds_seed_and_counts_that_add_up(part: Any) -> None:
    runs = part("runs")
    engine = sys.modules["engine"]
    prompt = Prompt("one", "own", "test", "def pop(", "", "")
    options = {"model": "fake:1", "draft": "fake:0.7", "temperature": 1.0, "max_tokens": 16, "seed": 3}
    llm = engine.LLM(engine.Options(**options))
    first, other = runs.decode(llm, prompt, 0), runs.decode(llm, prompt, 1)
    again = engine.LLM(engine.Options(**{**options, "seed": 4}))
    assert runs.decode(again, prompt, 0).output == other.output != first.output
    for outcome in (first, other):
        figures = outcome.figures
        assert outcome.tokens == len(outcome.output) <= figures["forwards"] + figures["accepted"]
        assert sum(figures["survived"]) == figures["accepted"] <= figures["proposed"]
        assert figures["drafts"] == sum(depth > 0 for depth in figures["depths"]) <= figures["forwards"]
        assert 0 <= figures["draft_s"] <= figures["steps_s"] <= outcome.seconds


def test_what_must_repeat_plain_decoding(part: Any) -> None:
    runs = part("runs")
    target = SimpleNamespace(model=SimpleNamespace(embedding=SimpleNamespace(weight=torch.zeros(1))))
    repeats = partial(runs.Lab.repeats_plain, SimpleNamespace(target=target))
    assert repeats(0.0, {})
    assert repeats(0.0, {"policy": "rejection"})
    assert repeats(1.0, {"policy": "coupled"})
    assert not repeats(1.0, {})
    assert not repeats(0.0, {"policy": "typical"})
    target.model.embedding.weight = torch.zeros(1, dtype=torch.bfloat16)
    assert not repeats(0.0, {})


def test_the_law_of_a_steps_first_token_is_the_loops(part: Any) -> None:
    """The formula for real contexts equals the enumeration of all outcomes of the loop."""
    distance = part("distance")
    engine = sys.modules["engine"]
    torch.manual_seed(0)
    target, draft = (distance.Table(torch.randn(4, 4, dtype=torch.float64)) for _ in range(2))
    params = engine.SamplingParams(temperature=0.7, max_new_tokens=2)
    for policy in (engine.ConfThreshold(0.2), engine.TopkAgree(2), engine.Typical(0.3, 0.6)):

        def run(walk: Any, policy: Any = policy) -> tuple[int, ...]:
            sequence = engine.Sequence([1], params, engine.Ending())
            drafter = engine.ModelDrafter(draft, walk)
            list(engine.decode(target, drafter, [sequence], policy, None, walk))
            return tuple(sequence.tokens[:1])

        walked = distance.Walk().law(run)
        probs = [(model.table[1] / params.temperature).softmax(-1) for model in (draft, target)]
        law = distance.emitted_law(probs[0], probs[1], policy.good(probs[1]))
        assert [walked[token,] for token in range(4)] == pytest.approx(law.tolist(), abs=1e-12)
        assert math.isclose(sum(walked.values()), 1)
        assert (law - probs[1]).abs().sum() > 0.05  # a lossy policy


@pytest.mark.parametrize(("size", "least"), [(2, 0.005), pytest.param(3, 0.1, marks=pytest.mark.slow)])
def test_a_policy_that_accepts_nothing_has_no_distance(part: Any, size: int, least: float) -> None:
    distance = part("distance")
    engine = sys.modules["engine"]
    assert distance.toy_distance(engine.ConfThreshold(1.0), 1.0, size) == pytest.approx(0, abs=1e-12)
    assert distance.toy_distance(engine.TopkAgree(3), 1.0, size) > least


def test_the_exploratory_tree_tries_every_rank_along_its_main_line(part: Any) -> None:
    calibration = part("calibrate")
    engine = sys.modules["engine"]
    shape = engine.best_shape(calibration.EXPLORATORY, calibration.NODES)
    tree, node = engine.Tree([0] * len(shape), shape), -1
    for _ in range(calibration.LEVELS):
        children = tree.children(node)
        assert len(children) == calibration.RANKS
        node = children[0]


def test_smoothing_leaves_no_zero_and_trusts_what_was_seen_often(part: Any) -> None:
    calibration = part("calibrate")
    table = [[0.6, 0.1, 0, 0, 0, 0, 0, 0], [1.0, 0, 0, 0, 0, 0, 0, 0]]
    often, once = calibration.smoothed(table, [100_000, 1])
    assert all(value > 0 for row in (often, once) for value in row)
    assert often[:2] == pytest.approx([0.6, 0.1], abs=1e-3)
    assert once[:2] == pytest.approx([0.6, 0.1], abs=0.05)


@pytest.mark.slow
def test_calibration_is_what_the_session_reads(tmp_path: Path, part: Any) -> None:
    folder = shutil.copytree(MODELS / "stdlib-10m", tmp_path / "model")
    run = bench("--calibrate", "--model", str(folder), "--prompts", "1", "--max-tokens", "12")
    assert run.returncode == 0, run.stderr[-2000:]
    table = json.loads((folder / "tree_acceptance.json").read_text())["model"]
    assert [len(row) for row in table] == [8] * 6
    assert all(0 < value < 1 for row in table for value in row)
    assert table[0][0] > 0.3 > table[0][7]  # the first token is accepted often, the eighth rarely
    part("runs")
    engine = sys.modules["engine"]
    assert engine.LLM(engine.Options(model=str(folder), draft="stdlib-1m")).tree_acceptance() == table


@pytest.mark.slow
def test_quick_measures_every_section(tmp_path: Path) -> None:
    tables = tables_of(bench("--quick", "--output", str(tmp_path)))
    assert set(tables) == EVERY
    rows = read_rows(tmp_path)
    assert not any(row.synthetic for row in rows)
    assert {row.round for row in rows if row.kind == "run" and row.section != "choice"} == {0, 1}
    assert all(line["speedup"] > 0 and line["speedup_low"] is None for line in tables["drafters"][1:])
    assert all(1 <= line["tokens_per_forward"] <= 9 for line in tables["drafters"] + tables["forced"])
    for line in tables["forced"]:
        assert line["survival"] == sorted(line["survival"], reverse=True)
        assert line["tokens_per_forward"] == pytest.approx(1 + sum(line["survival"]))
    failing = [line for line in tables["controllers"] if line["draft"] == "failing"]
    assert all(line["tokens_per_forward"] < 1.1 for line in failing)
    distances = {line["variant"]: line["first_token_tv"] for line in tables["distance"]}
    assert 0 < distances["topk_agree 1"] < distances["topk_agree 5"] < 0.5
    policies = {line["variant"]: line for line in tables["policies"]}
    assert policies["coupled"]["perplexity"] == policies["plain"]["perplexity"]  # the same text
    assert [line["variant"] for line in tables["phases"]] == ["phase 1", "phase 1, again", "phase 2", "phase 3"]
    assert all(line["what"] for line in tables["phases"])

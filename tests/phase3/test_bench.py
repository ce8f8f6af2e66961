"""bench.py: its grid, its refusals, and the two numbers that it computes instead of sampling them."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

import phase3
from common.benchmark import WrongResult
from common.checkpoint import MODELS
from common.phases import phases

pytestmark = pytest.mark.no_exercise  # bench.py is given

FOLDER = next(phase.folder for phase in phases() if phase.number == 3)
SECTIONS = {
    "drafters": {"drafter", "forced"},
    "policies": {"policy", "distance"},
    "controllers": {"controller"},
    "ngram": {"ngram", "index"},
    "phases": {"choice", "phases"},
}


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, FOLDER / "bench.py", *arguments], capture_output=True, text=True)


def rows_of(run: subprocess.CompletedProcess[str]) -> list[dict[str, Any]]:
    assert run.returncode == 0, run.stderr[-2000:]
    rows: list[dict[str, Any]] = json.loads(run.stdout.splitlines()[-1])["rows"]
    return rows


@pytest.fixture
def part(bench_part: Callable[[int, str], ModuleType]) -> Callable[[str], ModuleType]:
    """`part("distance")` imports that file of benchmarks/."""
    return lambda name: bench_part(3, name)


def test_a_dry_run_walks_the_whole_grid_and_goes_on_where_it_ended(tmp_path: Path) -> None:
    output = ("--dry-run", "--output", str(tmp_path))
    begun = rows_of(bench(*output, "--only", "ngram", "--only", "controllers"))
    assert {row["kind"] for row in begun} == SECTIONS["ngram"] | SECTIONS["controllers"]
    rows = rows_of(bench(*output, "--resume"))
    assert rows[: len(begun)] == begun
    assert {row["kind"] for row in rows} == set().union(*SECTIONS.values())
    assert all(row["synthetic"] for row in rows)
    assert len({json.dumps(row) for row in rows}) == len(rows)
    shapes = {"chain 4", "static 8", "static 16", "static 32", "dynamic 8", "dynamic 16", "dynamic 32"}
    for kind in ("drafter", "forced"):
        found = defaultdict(set)
        for row in rows:
            if row["kind"] == kind:
                found[row["drafter"], row["temperature"]].add(row["shape"])
        assert {"model", "ngram", "extrapolate"} <= {drafter for drafter, _ in found}
        for (drafter, _), seen in found.items():
            assert shapes <= seen if drafter in ("model", "medusa", "eagle") else seen == {"chain 4"}
    tried = {row["controller"] for row in rows if row["kind"] == "controller" and row["suite"] == "code"}
    assert tried == {*(f"fixed {k}" for k in range(1, 9)), "adaptive", "confidence", "cost"}
    assert {"drafters.png", "survival.png", "policies.png", "controllers.png"} <= {f.name for f in tmp_path.iterdir()}


@pytest.mark.parametrize("wrong", [["--only", "everything"], ["--calibrate", "--quick"], ["--resume"]])
def test_wrong_input_gets_one_line(wrong: list[str]) -> None:
    run = bench(*wrong)
    assert run.returncode == 2
    assert run.stderr.startswith("error: ")
    assert run.stderr.count("\n") == 1
    assert wrong[0] in run.stderr


class Typist:
    """A session that writes what it is told."""

    def __init__(self, tokens: list[int]) -> None:
        self.tokens, self.options, self.params = tokens, phase3.Options(), phase3.SamplingParams()

    def complete(self, texts: list[str]) -> list[Any]:
        return [SimpleNamespace(tokens=self.tokens, stats=SimpleNamespace(target_forwards=2)) for _ in texts]


def test_what_writes_other_tokens_than_plain_decoding_is_not_timed(part: Any) -> None:
    runs = part("runs")
    plain = runs.Variant(Typist([1, 2, 3]), ["a text"])
    same, wrong = (runs.Variant(Typist(tokens), ["a text"], plain) for tokens in ([1, 2, 3], [1, 2, 4]))
    plain()
    same()
    with pytest.raises(WrongResult, match="token 4 at position 2"):
        wrong()


def test_the_law_of_a_steps_first_token_is_the_loops(part: Any) -> None:
    """The formula that is used on real contexts, against a walk through all outcomes of the loop."""
    distance = part("distance")
    engine = sys.modules["engine"]
    torch.manual_seed(0)
    target, draft = (distance.Table(torch.randn(4, 4, dtype=torch.float64)) for _ in range(2))
    params = engine.SamplingParams(temperature=0.7, max_new_tokens=2)
    for policy in (engine.ConfThreshold(0.2), engine.TopkAgree(2), engine.Typical(0.3, 0.6)):

        def run(walk: Any, policy: Any = policy) -> tuple[int, ...]:
            sequence = engine.Sequence([1], params, engine.Ending())
            drafter = engine.ModelDrafter(draft, params, walk)
            list(engine.speculative_decode(target, drafter, [sequence], params, policy, None, walk))
            return tuple(sequence.tokens[:1])

        walked = distance.Walk().law(run)
        probs = [(model.table[1] / params.temperature).softmax(-1) for model in (draft, target)]
        law = distance.emitted_law(probs[0], probs[1], policy.good(probs[1]))
        assert [walked[token,] for token in range(4)] == pytest.approx(law.tolist(), abs=1e-12)
        assert math.isclose(sum(walked.values()), 1)
        assert (law - probs[1]).abs().sum() > 0.05  # it is a lossy one


def test_a_policy_that_lets_nothing_stand_has_no_distance(part: Any) -> None:
    distance = part("distance")
    engine = sys.modules["engine"]
    assert distance.toy_distance(engine.ConfThreshold(1.0), 1.0) == pytest.approx(0, abs=1e-12)
    assert distance.toy_distance(engine.TopkAgree(3), 1.0) > 0.1


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
    assert table[0][0] > 0.3 > table[0][7]  # the first guess stands often, the eighth hardly ever
    part("runs")
    engine = sys.modules["engine"]
    assert engine.Session(engine.Options(model=str(folder), draft="stdlib-1m")).tree_acceptance() == table


@pytest.mark.slow
def test_quick_measures_every_section(tmp_path: Path) -> None:
    rows = rows_of(bench("--quick", "--output", str(tmp_path)))
    assert {row["kind"] for row in rows} == set().union(*SECTIONS.values())
    assert not any(row["synthetic"] for row in rows)
    of = {kind: [row for row in rows if row["kind"] == kind] for kind in set().union(*SECTIONS.values())}
    assert all(0 < row["speedup_low"] <= row["speedup"] <= row["speedup_high"] for row in of["drafter"])
    assert all(1 <= row["tokens_per_forward"] <= row["k"] + 1 for row in of["drafter"] + of["forced"])
    failing = [row for row in of["controller"] if row["suite"] == "failing"]
    assert all(row["tokens_per_forward"] < 1.1 for row in failing)
    distances = {(row["policy"], row["strength"]): row["first_token_tv"] for row in of["distance"]}
    assert 0 < distances["topk_agree", 1] < distances["topk_agree", 5] < 0.5
    plain = next(row for row in of["policy"] if row["policy"] == "plain")
    coupled = next(row for row in of["policy"] if row["policy"] == "coupled")
    assert coupled["perplexity"] == plain["perplexity"]  # the same text
    assert [row["phase"] for row in of["phases"]] == ["phase 1", "phase 2", "phase 3"]

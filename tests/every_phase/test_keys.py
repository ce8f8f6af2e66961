"""Every random number of every loop is the one in the table of KeyedSource, and none decides two things."""

from __future__ import annotations

import importlib
import itertools
from collections import Counter
from typing import Any

import pytest
import torch

from common.phases import Phase, phases
from common.philox import Purpose
from tests.support import keys
from tests.support.small import sequences_of, small_session

pytestmark = pytest.mark.newest

PROMPTS = [[1, 2, 3, 1, 2], [7]]
SEEDS = [5, -6]  # of each prompt
SAMPLES = [0, 3]
MODEL: dict[str, Any] = {"draft": "fake:0.7"}
POLICIES = ("rejection", "coupled", "longest_prefix", "conf_threshold", "topk_agree", "typical")
DRAFTERS = ("model", "ngram", "extrapolate", "medusa", "eagle")
BRANCHING = ("model", "medusa", "eagle")
SHORT: dict[str, Any] = {"k": 2}  # random heads seldom guess more
BY_DRAFTER = {"model": MODEL, "extrapolate": SHORT, "medusa": SHORT, "eagle": SHORT}
TREES: dict[str, dict[str, Any]] = {
    "chain": {},
    "static tree": {"tree": "static", "k": 3, "tree_nodes": 8},
    "dynamic tree": {"tree": "dynamic", "k": 3, "tree_nodes": 8},
}
CERTAIN = {"own", "accept", "residual"}
DRAWN = {*CERTAIN, "draft"}


def rules(drafter: str, tree: str, policy: str) -> set[str]:
    """By which something is decided."""
    drawn = set[str]()
    if tree == "chain" and drafter != "ngram":
        drawn = {"draft"}
    elif tree == "static tree" and policy in ("rejection", "coupled"):
        drawn = {"children"}
    return drawn | (CERTAIN if policy == "rejection" and tree != "dynamic tree" else {"own"})


# Options, the first phase that has them, and the rules by which something is decided.
WAYS: dict[str, tuple[dict[str, Any], int, set[str]]] = {
    "plain": ({"draft": "none"}, 2, {"own"}),
    "model": (MODEL, 2, DRAWN),
    "model, top-p": ({**MODEL, "top_p": 0.8, "temperature": 1.3}, 2, DRAWN),
    "model, confidence": ({**MODEL, "controller": "confidence"}, 3, DRAWN),
    **{
        f"{drafter}, {tree}, {policy}": (
            {"drafter": drafter, "policy": policy, **BY_DRAFTER.get(drafter, {}), **TREES[tree]},
            3,
            rules(drafter, tree, policy),
        )
        for drafter, tree, policy in itertools.product(DRAFTERS, TREES, POLICIES)
        if tree == "chain" or drafter in BRANCHING
    },
}
QUICK = {
    *list(WAYS)[:4],
    *(f"model, chain, {policy}" for policy in POLICIES),
    *(f"model, static tree, {policy}" for policy in ("rejection", "coupled", "longest_prefix", "typical")),
    *(f"model, dynamic tree, {policy}" for policy in ("rejection", "coupled")),
    *(f"{drafter}, chain, {policy}" for drafter in DRAFTERS[1:] for policy in ("rejection", "coupled")),
    *(f"{drafter}, static tree, rejection" for drafter in ("medusa", "eagle")),
    "medusa, static tree, coupled",
    "eagle, dynamic tree, rejection",
}


@pytest.fixture(params=[pytest.param(way, marks=[] if way in QUICK else [pytest.mark.slow]) for way in WAYS])
def way(request: pytest.FixtureRequest, phase: Phase) -> tuple[dict[str, Any], set[str]]:
    options, since, decided_by = WAYS[request.param]
    if phase.number < since:
        pytest.skip(f"comes with phase {since}")
    return options, decided_by


def how_to_run(engine: Any, watch: Any, watched: bool) -> list[Any]:
    """Phase 2 calls a function in its plain steps. From phase 3 on a step holds logits, from 5 on if made alone."""
    if hasattr(engine, "make_runner"):
        return [not watched]
    return [] if hasattr(engine, "TargetOutput") else [watch if watched else None]


def run(engine: Any, made: Any, sequences: list[Any], watched: bool = True) -> list[keys.Part]:
    """Return all parts of all steps. watched: steps without a draft run one at a time, and have their logits."""
    found: list[keys.Part] = []

    def watch(active: list[Any], logits: torch.Tensor) -> None:
        found.extend(keys.parts_of_plain(engine, active, logits))

    steps = made.run(sequences, *how_to_run(engine, watch, watched))
    for step in steps:
        if step is not None:
            found.extend(keys.parts(step))
    return found


def decided(made: Any, found: list[keys.Part]) -> list[keys.Decision]:
    """Return all decisions of a run."""
    policy, noise = "rejection", Purpose.DRAFT
    if (chosen := getattr(made, "policy", None)) is not None:
        noise = chosen.draft_noise
        if not chosen.lossless:
            policy = "lossy"
        elif type(chosen).__name__ == "SampleMatch":
            policy = "own choice"
    return [each for part in found for each in keys.decisions(part, policy, noise)]


@pytest.mark.newest(3)
def test_every_number_is_the_one_that_the_table_names(
    phase: Phase, way: tuple[dict[str, Any], set[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In torch, for two samples of each of two prompts of one batch, each with a seed of its own.

    By the decisions, and by the requested numbers.
    """
    engine = importlib.import_module(phase.package)
    options, decided_by = way
    made = small_session(engine, monkeypatch, **options)
    sequences = sequences_of(engine, made, PROMPTS, SAMPLES, SEEDS)
    with keys.asked_of_philox(monkeypatch) as asked:
        found = run(engine, made, sequences)
    everything = decided(made, found)
    counts = keys.check(everything)
    assert set(counts) == decided_by
    assert min(counts.values()) > 10
    named = {each.key for each in everything}
    assert named <= asked
    # Other requested numbers decide nothing: they are after a rejected token, or pad a row of a batch.
    assert {key.purpose for key in asked - named} <= {Purpose.DRAFT, Purpose.ACCEPT}
    if {"draft", "residual"} <= decided_by:
        assert later_in_a_block(everything, found) >= {"accept", "residual", "own"}


def later_in_a_block(everything: list[keys.Decision], found: list[keys.Part]) -> set[str]:
    """Return the rules of decisions after an accepted token: only there a wrong position shows."""
    starts = {(part.owner, part.length) for part in found}
    return {each.rule for each in everything if (each.owner, each.key.position) not in starts}


def test_the_table_is_the_one_in_the_docstring(engine: Any, phase: Phase) -> None:
    if phase.number == 1:
        pytest.skip("nothing but plain sampling")
    lines = [line.split("|") for line in engine.KeyedSource.__doc__.splitlines() if line.count("|") == 4]
    written = {cells[1].strip(): cells[2].strip() for cells in lines[2:]}
    assert written == {rule.decision: rule.purpose.name for rule in keys.RULES.values() if rule.since <= phase.number}


CPP: dict[str, tuple[dict[str, Any], set[str]]] = {
    "model": ({"k": 4}, DRAWN),
    "model, coupled": ({"k": 4, "policy": "coupled"}, {"own", "draft"}),
    "model, longest_prefix": ({"k": 4, "policy": "longest_prefix"}, {"own", "draft"}),
    "ngram": ({"drafter": "ngram"}, CERTAIN),
    "static tree": (TREES["static tree"], {*CERTAIN, "children"}),
    "medusa": ({"drafter": "medusa", "k": 3}, DRAWN),
    "eagle": ({"drafter": "eagle", "k": 3}, DRAWN),
}
SLOWER = ("static tree", "medusa", "eagle")
TEXT = "def read(path):\n    with open(path) as file:\n        return file.read()\n\n\ndef write(path"
cpp_phases = [phase for phase in phases() if phase.number >= 5]


def cpp_session(phase: Phase, **options: Any) -> tuple[Any, Any]:
    """Make an LLM on the embedded models whose steps run in C++."""
    engine = importlib.import_module(phase.package)
    registry = importlib.import_module(f"{phase.package}.kernels.registry")
    if (reason := registry.why_not("cpp", torch.device("cpu"))) is not None:
        pytest.skip(f"no C++ backend here: {reason}")
    chosen = {"kernels": "cpp", "device": "cpu", "dtype": "float32", "temperature": 1.0, "max_tokens": 60, "seed": 7}
    return engine, engine.LLM(engine.Options(**{**chosen, **options}))


@pytest.mark.no_exercise  # which has no C++
@pytest.mark.parametrize("phase", cpp_phases, ids=lambda phase: phase.package)
@pytest.mark.parametrize("way", [pytest.param(way, marks=pytest.mark.slow) if way in SLOWER else way for way in CPP])
def test_and_in_cpp(phase: Phase, way: str) -> None:
    """Watched step by step every number is right; several steps in one call give the same tokens, step by step."""
    options, decided_by = CPP[way]
    engine, made = cpp_session(phase, controller="fixed", **options)
    written = []
    for watched in (True, False):
        sequences = made.sequences([TEXT])
        if watched:
            counts: Counter[str] = keys.check(decided(made, run(engine, made, sequences)))
        else:
            together = [step.output is None for step in made.run(sequences)]
        written.append((sequences[0].tokens, [(each.proposed, each.accepted) for each in sequences[0].steps]))
    assert set(counts) == decided_by
    assert min(counts.values()) >= 5
    assert any(together) or way == "static tree", "no step was made entirely in C++"
    assert written[0] == written[1]


@pytest.mark.no_exercise
@pytest.mark.parametrize("phase", cpp_phases, ids=lambda phase: phase.package)
@pytest.mark.parametrize("options", [{}, {"top_p": 0.9}], ids=["plain", "filtered"])
def test_and_in_plain_decoding_in_cpp(phase: Phase, options: dict[str, Any]) -> None:
    """Watched token by token every number is right; several tokens in one call are the same tokens."""
    engine, made = cpp_session(phase, draft="none", **options)
    written = []
    for watched in (True, False):
        sequences = made.sequences([TEXT])
        found = run(engine, made, sequences, watched)
        written.append(sequences[0].tokens)
        own = keys.check(decided(made, found))
        assert own.keys() <= {"own"}
        assert own.total() == len(written[-1]) if watched else own.total() <= 2  # the first and a last one, made alone
    assert written[0] == written[1]

"""`--record` with every policy, drafter, tree and controller: the run can be replayed from its file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from common.options import run_main
from common.recording import Recording
from phase3.cli import main

Check = Callable[[Path], Recording]
FAKE = ["--model", "fake", "--draft", "fake:0.7", "--prompt", "x y z x y", "--max-tokens", "16"]
COMPARISONS = {
    "rejection": "uniform",
    "coupled": "own_draw",
    "longest_prefix": "own_draw",
    "conf_threshold": "threshold",
    "topk_agree": "threshold",
    "typical": "threshold",
}


def completions(capsys: pytest.CaptureFixture[str], *arguments: object) -> list[dict[str, Any]]:
    with pytest.raises(SystemExit) as end:
        run_main(main, [str(argument) for argument in (*arguments, "--json")])
    assert end.value.code == 0
    found: list[dict[str, Any]] = json.loads(capsys.readouterr().out)["completions"]
    return found


@pytest.fixture
def recorded(capsys: pytest.CaptureFixture[str], tmp_path: Path, check_recording: Check) -> Callable[..., Recording]:
    """Run with and without recording: the tokens are equal, and the recording fits the schema and is consistent."""

    def record(*arguments: object) -> Recording:
        plain = completions(capsys, *arguments)
        with_record = completions(capsys, *arguments, "--record", tmp_path / "run.jsonl")
        recording = check_recording(tmp_path / "run.jsonl")
        assert [each["tokens"] for each in with_record] == [each["tokens"] for each in plain]
        assert [recording.tokens(number) for number in range(len(plain))] == [each["tokens"] for each in plain]
        assert recording.footer is not None
        for end, done in zip(recording.footer["sequences"], with_record, strict=True):
            assert {name: done["stats"][name] for name in ("steps", "proposed", "accepted")}.items() <= end.items()
        return recording

    return record


@pytest.mark.covering(1)
@pytest.mark.parametrize("policy", COMPARISONS)
@pytest.mark.parametrize("drafter", ["model", "ngram", "extrapolate"])
@pytest.mark.parametrize("temperature", [0, 1])
def test_every_policy_and_drafter_of_chains(
    recorded: Callable[..., Recording], policy: str, drafter: str, temperature: int
) -> None:
    recording = recorded(*FAKE, "--drafter", drafter, "--policy", policy, "--temperature", temperature)
    assert recording.header["settings"]["policy"] == policy
    assert recording.header["draft"] == ("fake:0.7" if drafter == "model" else drafter)
    expected = "certain" if policy == "rejection" and temperature == 0 else COMPARISONS[policy]
    assert {step["comparison"] for step in recording.steps} - {None} == {expected}
    proposed = [each for step in recording.steps for each in step["proposed"]]
    if drafter == "ngram" or temperature == 0:
        assert all(each["draft_prob"] == 1.0 for each in proposed)
    else:
        assert any(each["draft_prob"] < 1.0 for each in proposed)
    assert any(each["uniform"] is not None for each in proposed) == (expected == "uniform")


@pytest.mark.covering(1)
@pytest.mark.parametrize("policy", COMPARISONS)
@pytest.mark.parametrize("tree", ["static", "dynamic"])
@pytest.mark.parametrize("temperature", [0, 1])
def test_every_policy_and_tree(recorded: Callable[..., Recording], policy: str, tree: str, temperature: int) -> None:
    """Candidates have their draft probabilities; after the rejection of a sibling, those of the residual."""
    recording = recorded(*FAKE, "--tree", tree, "--policy", policy, "--temperature", temperature)
    drawn = tree == "static" and temperature == 1 and policy in ("rejection", "coupled")
    expected = "own_draw" if policy == "rejection" and not drawn else COMPARISONS[policy]
    assert {step["comparison"] for step in recording.steps} - {None} == {expected}
    trees = [step for step in recording.steps if step["proposed"]]
    assert any([each["parent"] for each in step["proposed"]].count(-1) > 1 for step in trees)
    for step in trees:
        for parent in {each["parent"] for each in step["proposed"]}:
            probs = [each["draft_prob"] for each in step["proposed"] if each["parent"] == parent]
            assert all(0 < prob < 1.0001 for prob in probs)
            if not drawn:  # chosen by probability, with a sum of at most 1
                assert probs == sorted(probs, reverse=True)
                assert sum(probs) < 1.0001


def test_siblings_that_are_tried_one_after_the_other(recorded: Callable[..., Recording]) -> None:
    """Each has its own uniform number, and its probability without the siblings rejected before it."""
    arguments = ["--prompt", "def read(", "--max-tokens", 16, "--tree", "static", "--temperature", 1]
    recording = recorded(*arguments)
    assert {step["comparison"] for step in recording.steps} <= {"uniform", None}
    tried = [
        siblings
        for step in recording.steps
        for above in [-1, *step["path"]]
        if len(siblings := [each for each in step["proposed"] if each["parent"] == above and each["uniform"]]) > 1
    ]
    assert tried
    for siblings in tried:
        assert len({each["uniform"] for each in siblings}) == len(siblings)
        assert not any(each["accepted"] for each in siblings[:-1])
    assert any(0 < each["chance"] < 1 for siblings in tried for each in siblings[1:])


@pytest.mark.covering(1)
@pytest.mark.parametrize("drafter", ["medusa", "eagle"])
@pytest.mark.parametrize("tree", ["off", "static", "dynamic"])
@pytest.mark.parametrize("temperature", [0, 1])
def test_drafters_that_read_the_targets_states(
    recorded: Callable[..., Recording], drafter: str, tree: str, temperature: int
) -> None:
    arguments = ["--prompt", "def read(", "--prompt", "import ", "--max-tokens", 8, "--drafter", drafter]
    recording = recorded(*arguments, "--tree", tree, "--temperature", temperature)
    assert recording.header["draft"] == drafter
    proposed = [each for step in recording.steps for each in step["proposed"]]
    assert any(each["accepted"] for each in proposed)
    if temperature == 1 or tree != "off":
        assert all(0 < each["draft_prob"] < 1 for each in proposed)


@pytest.mark.covering(1)
@pytest.mark.parametrize("controller", ["fixed", "adaptive", "confidence", "cost"])
@pytest.mark.parametrize("drafter", ["model", "ngram"])
def test_controllers_and_batches(recorded: Callable[..., Recording], controller: str, drafter: str) -> None:
    """With `cost`, tokens depend on the clock unless the target draws them itself; some steps draft nothing."""
    more = ["--prompt", "a b a b a", "--n", 2, "--temperature", 1, "--policy", "longest_prefix"]
    recording = recorded(*FAKE, "--drafter", drafter, "--controller", controller, *more)
    assert [each["prompt"] for each in recording.header["sequences"]] == [0, 0, 1, 1]
    assert {step["sequence"] for step in recording.steps} == {0, 1, 2, 3}
    rounds = [[step["sequence"] for step in recording.steps if step["step"] == n] for n in (0, 1)]
    assert rounds == [[0, 1, 2, 3]] * 2
    assert any(step["comparison"] is None for step in recording.steps)


def test_plain_steps_between_drafted_ones(recorded: Callable[..., Recording]) -> None:
    """Prompt lookup often finds nothing; such a step records the target's distribution too."""
    recording = recorded(*FAKE, "--drafter", "ngram", "--temperature", 1)
    plain = [step for step in recording.steps if step["comparison"] is None]
    assert plain
    assert all(step["next"]["origin"] == "plain" and len(step["target_top"]) == 5 for step in plain)

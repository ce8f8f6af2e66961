"""The options of phase 3: drafters, controllers, trees and policies."""

from __future__ import annotations

import json
import re
import sys
from typing import Any

import pytest

import phase3
from common.options import run_main
from common.phases import ROOT
from common.philox import Purpose
from phase3.cli import main
from tests.support import forked

FAKE = ["--model", "fake", "--prompt", "x y z x y", "--max-tokens", "40"]
LOSSLESS = ["rejection", "coupled", "longest_prefix"]
LOSSY = ["conf_threshold", "topk_agree", "typical"]


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as end:
        run_main(main, [str(argument) for argument in arguments])
    return int(end.value.code or 0)


def completion(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[dict[str, Any], dict[str, Any]]:
    """Run, and return the first completion and the settings."""
    assert run(*FAKE, *arguments, "--json") == 0
    document = json.loads(capsys.readouterr().out)
    return document["completions"][0], document["settings"]


@pytest.mark.parametrize("policy", LOSSLESS)
@pytest.mark.parametrize("drafter", ["model", "ngram", "extrapolate"])
def test_greedy_text_is_the_same_whoever_drafts(capsys: pytest.CaptureFixture[str], policy: str, drafter: str) -> None:
    plain, _ = completion(capsys, "--draft", "none")
    done, settings = completion(
        capsys, "--draft", "fake:0.7", "--drafter", drafter, "--policy", policy, "--controller", "adaptive"
    )
    assert done["tokens"] == plain["tokens"]
    assert (settings["drafter"], settings["policy"], settings["controller"]) == (drafter, policy, "adaptive")
    assert done["stats"]["draft"] == ("fake:0.7" if drafter == "model" else drafter)
    assert plain["stats"]["draft"] is None


@pytest.mark.parametrize("policy", ["coupled", "longest_prefix"])
@pytest.mark.parametrize("controller", ["fixed", "adaptive", "confidence", "cost"])
def test_own_choices_sample_the_plain_text(capsys: pytest.CaptureFixture[str], policy: str, controller: str) -> None:
    sampled = ["--temperature", 1, "--seed", 3]
    plain, _ = completion(capsys, "--draft", "none", *sampled)
    done, _ = completion(capsys, "--draft", "fake:0.7", "--policy", policy, "--controller", controller, *sampled)
    assert done["tokens"] == plain["tokens"]


def test_a_controllers_bounds_are_options(capsys: pytest.CaptureFixture[str]) -> None:
    def ks(*arguments: object) -> set[int]:
        done, _ = completion(capsys, "--draft", "fake:0.6", "--metrics-detailed", *arguments)
        return {step["k"] for step in done["stats"]["per_step"][:-3]}  # the last are cut short by --max-tokens

    assert ks("--k", 3) == {3}
    assert {2, 3} <= ks("--controller", "adaptive", "--min-k", 2, "--max-k", 5) <= {2, 3, 4, 5}
    assert ks("--controller", "confidence", "--max-k", 6, "--confidence", 0.9) == {6}


@pytest.mark.parametrize(
    ("options", "policy"),
    [
        ({"policy": "conf_threshold", "tau": 0.7}, phase3.ConfThreshold(0.7)),
        ({"policy": "topk_agree", "agree_k": 9}, phase3.TopkAgree(9)),
        ({"policy": "typical", "epsilon": 0.2, "delta": 0.6}, phase3.Typical(0.2, 0.6)),
        ({"policy": "coupled", "lossless": True}, phase3.SampleMatch(Purpose.SAMPLE)),
        ({"policy": "longest_prefix", "temperature": 1.0}, phase3.SampleMatch(Purpose.DRAFT)),
        ({"lossless": True}, phase3.SampleMatch(Purpose.DRAFT)),  # auto, greedy
    ],
)
def test_policies_and_their_parameters_are_options(options: dict[str, Any], policy: Any) -> None:
    assert phase3.Options(**options).acceptance_policy() == policy
    assert isinstance(phase3.Options(temperature=1.0, lossless=True).acceptance_policy(), phase3.Rejection)


@pytest.mark.parametrize("drafter", ["ngram", "extrapolate"])
def test_show_and_explain_know_drafters_that_sometimes_have_nothing(
    capsys: pytest.CaptureFixture[str], drafter: str
) -> None:
    run(*FAKE, "--draft", "none")
    text = capsys.readouterr().out
    assert run(*FAKE, "--drafter", drafter, "--show", "--explain") == 0
    out, err = capsys.readouterr()
    assert len(out.rstrip("\n")) == len(text.rstrip("\n")) + 2 * 40  # every token has its marks
    assert "0 accepted:" in err
    assert "Speculation was" in err


def test_show_tree_begins_a_line_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*FAKE, "--draft", "fake:0.7", "--tree", "static", "--show-tree") == 0
    lines = capsys.readouterr().err.splitlines()
    headings = [i for i, line in enumerate(lines) if re.fullmatch(r"\d+ of \d+ nodes accepted", line)]
    assert headings
    assert all(lines[i - 1] == "" for i in headings)
    assert any(line.endswith(" accepted") for line in lines if line not in {lines[i] for i in headings})
    assert sum(line.endswith(" follows") for line in lines) == len(headings)


def test_nothing_leaks_from_one_run_into_the_next() -> None:
    """The second run in a process has the tokens, steps and counts of a single run in a new process."""
    arguments = ["--model", "fake", "--drafter", "ngram", "--controller", "adaptive", "--policy", "coupled"]
    arguments += ["--temperature", "1", "--max-tokens", "60", "--prompt", "a b a b a b a"]
    script = ROOT / "phase-3-policies-drafters" / "generate.py"
    output = forked.run([sys.executable, script, *arguments, "--json"], cwd=ROOT, check=True).stdout
    fresh = json.loads(output)["completions"][0]
    llm = phase3.LLM(
        phase3.Options(
            model="fake", drafter="ngram", controller="adaptive", policy="coupled", temperature=1.0, max_tokens=60
        )
    )
    llm.generate(["b a b a a a b b", "c d c d"])
    llm.generate(["a b a b a b a"])
    (sequence,) = llm.sequences(["a b a b a b a"])
    for _ in llm.run([sequence]):
        pass
    steps = sequence.steps
    assert sequence.tokens == fresh["tokens"]
    assert len(steps) == fresh["stats"]["steps"]
    assert sum(step.proposed for step in steps) == fresh["stats"]["proposed"] > 0
    assert sum(step.accepted for step in steps) == fresh["stats"]["accepted"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--tau", "0"], ["--tau", "greater than 0"]),
        (["--tau", "1.5"], ["--tau", "less than or equal to 1"]),
        (["--tau", "nan"], ["--tau"]),
        (["--epsilon", "0"], ["--epsilon"]),
        (["--epsilon", "2"], ["--epsilon"]),
        (["--delta", "-1"], ["--delta"]),
        (["--delta", "1.1"], ["--delta"]),
        (["--agree-k", "0"], ["--agree-k"]),
        (["--agree-k", "some"], ["--agree-k", "integer"]),
        (["--min-k", "0"], ["--min-k"]),
        (["--min-k", "5", "--max-k", "4"], ["--min-k 5", "--max-k 4"]),
        (["--target-acceptance", "0"], ["--target-acceptance"]),
        (["--target-acceptance", "1"], ["--target-acceptance"]),
        (["--confidence", "1.01"], ["--confidence"]),
        (["--ngram-min", "0"], ["--ngram-min"]),
        (["--ngram-min", "4", "--ngram-max", "2"], ["--ngram-min 4", "--ngram-max 2"]),
        (["--alpha", "inf"], ["--alpha"]),
        (["--policy", "best"], ["--policy", "rejection", "typical"]),
        (["--controller", "best"], ["--controller", "adaptive"]),
        (["--drafter", "best"], ["--drafter", "ngram"]),
        *[(["--lossless", "--policy", policy], ["--lossless", policy, "rejection"]) for policy in LOSSY],
        *[(["--beams", "2", "--policy", policy], ["--beams", "--policy"]) for policy in ("coupled", "typical")],
        (["--beams", "2", "--drafter", "ngram"], ["--beams", "--drafter"]),
        (["--beams", "2", "--controller", "cost"], ["--beams", "--controller"]),
    ],
)
def test_wrong_input_gets_one_line(capsys: pytest.CaptureFixture[str], arguments: list[str], words: list[str]) -> None:
    assert run(*FAKE, *arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    for word in words:
        assert word in err

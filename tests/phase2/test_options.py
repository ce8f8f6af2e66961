"""The command line options of phase 2."""

from __future__ import annotations

import json
import re

import pytest

from common.options import run_main
from phase2.cli import main
from phase2.explain import Account, account, survival, textbook_speedup, verdict
from phase2.speculative import StepStats

FAKE = ["--model", "fake", "--prompt", "x y z", "--max-tokens", "40"]


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as end:
        run_main(main, [str(argument) for argument in arguments])
    return int(end.value.code or 0)


def test_the_same_text_with_and_without_a_draft(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*FAKE, "--draft", "none") == 0
    plain = capsys.readouterr().out
    assert run(*FAKE, "--draft", "fake:0.7") == 0
    assert capsys.readouterr().out == plain


def test_json_counts_the_draft(capsys: pytest.CaptureFixture[str]) -> None:
    run(*FAKE, "--draft", "fake:1", "--json", "--metrics-detailed")
    stats = json.loads(capsys.readouterr().out)["completions"][0]["stats"]
    assert stats["draft"] == "fake:1"
    assert stats["acceptance"] == 1.0
    assert stats["target_forwards"] == stats["steps"] == len(stats["per_step"]) == 8
    assert stats["proposed"] == stats["accepted"] == 40 - 8
    first = stats["per_step"][0]
    assert first["k"] == first["accepted"] == 4
    assert first["emitted"] == 5
    assert first["verify_ms"] > 0


@pytest.mark.about("engine/show.py, Show.step")
def test_show_marks_the_text_off_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    run(*FAKE, "--draft", "none")
    text = capsys.readouterr().out
    run(*FAKE, "--draft", "fake:0.7", "--json")
    stats = json.loads(capsys.readouterr().out)["completions"][0]["stats"]
    run(*FAKE, "--draft", "fake:0.7", "--show")
    out, err = capsys.readouterr()
    added = {mark: out.count(mark) - text.count(mark) for mark in "[]{}<>"}
    assert added["["] == added["]"] == stats["accepted"] > 0
    assert added["{"] + added["<"] == stats["new_tokens"] - stats["accepted"]
    assert added["{"] > 0
    assert len(out.rstrip("\n")) == len(text.rstrip("\n")) + 2 * stats["new_tokens"]
    assert "4 accepted:" in err
    assert "[draft tokens that were accepted]" in err


@pytest.mark.about("engine/show.py, Show.step")
def test_show_colours_the_text_in_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run(*FAKE, "--draft", "none")
    text = capsys.readouterr().out
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    run(*FAKE, "--draft", "fake:0.7", "--show")
    out, _ = capsys.readouterr()
    assert "\x1b[32m" in out
    assert re.sub(r"\x1b\[[\d;]*m", "", out).rstrip("\n") == text.rstrip("\n")


@pytest.mark.no_exercise
@pytest.mark.parametrize(
    "plain", [["--draft", "none"], ["--beams", "2"], ["--model", "stdlib-10m", "--beams", "2", "--max-tokens", "2"]]
)
def test_show_of_a_plain_run_is_its_text(capsys: pytest.CaptureFixture[str], plain: list[str]) -> None:
    assert run(*FAKE, *plain) == 0
    text = capsys.readouterr().out
    assert run(*FAKE, *plain, "--show") == 0
    out, err = capsys.readouterr()
    assert out == text
    assert "nothing to mark" in err


@pytest.mark.about("engine/explain.py, print_explanation")
def test_explain_gives_an_account(capsys: pytest.CaptureFixture[str]) -> None:
    run(*FAKE, "--draft", "fake:0.7", "--explain")
    err = capsys.readouterr().err
    assert "Speculation was" in err
    assert "predicted speed-up" in err
    run(*FAKE, "--draft", "none", "--explain")
    assert "there is no draft" in capsys.readouterr().err


def step(k: int, accepted: int) -> StepStats:
    return StepStats(k, k, accepted, accepted + 1, draft_ms=k * 1.0, verify_ms=10.0, accept_ms=0.0)


@pytest.mark.about("engine/explain.py, account")
def test_the_account_by_hand() -> None:
    steps = [step(2, 2), step(2, 1), step(2, 0), step(2, 2)]
    assert survival(steps, 2) == [0.75, 0.5]
    costs = account(steps, plain_ms=9.0)
    assert costs is not None
    assert costs.speedup(2) == pytest.approx((1 + 0.75 + 0.5) * 9 / 12)
    assert costs.speedup(1) == pytest.approx(1.75 * 9 / 11)
    # (1 + a + a^2) 9 >= 12 from a = 0.264 on
    assert costs.break_even_acceptance() == pytest.approx(0.264, abs=0.002)
    assert textbook_speedup(0.5, 0.0, 3) == pytest.approx(1.875)
    assert textbook_speedup(1.0, 0.25, 4) == pytest.approx(2.5)


@pytest.mark.about("engine/explain.py, verdict")
def test_the_verdict_says_when_speculation_loses() -> None:
    hopeless = Account(plain_ms=1.0, draft_ms=2.0, verify_ms=1.0, accept_ms=0.0, shares=[0.2, 0.0])
    text = verdict(hopeless, measured=0.3)
    assert "slower" in text
    assert "no acceptance would make it pay" in text
    assert "--draft none" in text
    good = Account(plain_ms=10.0, draft_ms=1.0, verify_ms=10.0, accept_ms=0.0, shares=[0.9, 0.8])
    assert "faster" in verdict(good, measured=2.0)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        pytest.param(["--k", "0"], ["--k"], marks=pytest.mark.no_exercise),
        pytest.param(["--k", "2.5"], ["--k", "integer"], marks=pytest.mark.no_exercise),
        (["--draft", "no-such-draft"], ["no-such-draft"]),
        (["--draft", "fake:1.5"], ["[0, 1]"]),
        (["--draft", "fake:often"], ["fake:often"]),
        (["--draft", "fake:"], ["fake:", "fake:0.7"]),
        pytest.param(["--draft", "fake:0.5", "--beams", "2"], ["--beams", "--draft"], marks=pytest.mark.no_exercise),
        (["--draft", "fake:0.5", "--record", "no/such/folder/run.jsonl"], ["--record", "no/such/folder"]),
        pytest.param(["--record", "run.jsonl", "--beams", "2"], ["--beams", "--record"], marks=pytest.mark.no_exercise),
        pytest.param(["--show", "--json"], ["--show", "--json"], marks=pytest.mark.no_exercise),
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

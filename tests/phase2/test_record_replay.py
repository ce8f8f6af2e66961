"""`--record`: a run that can be replayed from its file alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import phase2
from common.errors import UserError
from common.options import run_main
from common.recording import Recording, contradictions, read_recording
from phase2.cli import main
from phase2.record import Recorder

Check = Callable[[Path], Recording]
FAKE = ["--model", "fake", "--prompt", "x y z", "--max-tokens", "24"]


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as end:
        run_main(main, [str(argument) for argument in arguments])
    return int(end.value.code or 0)


def completions(capsys: pytest.CaptureFixture[str], *arguments: object) -> list[dict[str, Any]]:
    assert run(*arguments, "--json") == 0
    found: list[dict[str, Any]] = json.loads(capsys.readouterr().out)["completions"]
    return found


@pytest.mark.about("engine/record.py, Recorder.step")
@pytest.mark.parametrize("temperature", [0, 1])
@pytest.mark.parametrize("draft", ["none", "fake:0.7"])
@pytest.mark.parametrize("more", [[], ["--prompt", "a much longer one", "--n", "2", "--top-k", "40"]])
def test_a_recording_holds_the_run_and_changes_nothing(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    check_recording: Check,
    temperature: int,
    draft: str,
    more: list[str],
) -> None:
    arguments = [*FAKE, "--draft", draft, "--temperature", temperature, "--seed", 5, *more]
    plain = completions(capsys, *arguments)
    recorded = completions(capsys, *arguments, "--record", tmp_path / "run.jsonl")
    recording = check_recording(tmp_path / "run.jsonl")
    assert recording.footer is not None
    assert [each["tokens"] for each in recorded] == [each["tokens"] for each in plain]
    prompts = recording.header["prompts"]
    for number, (of, end, done) in enumerate(
        zip(recording.header["sequences"], recording.footer["sequences"], plain, strict=True)
    ):
        assert recording.tokens(number) == done["tokens"]
        assert prompts[of["prompt"]]["tokens"] == done["prompt_tokens"]
        assert "".join(prompts[of["prompt"]]["strings"]) == ("x y z" if of["prompt"] == 0 else "a much longer one")
        assert end["text"] == done["text"]
        assert end["finish_reason"] == done["finish_reason"]
        for name in ("new_tokens", "steps", "target_forwards", "proposed", "accepted"):
            assert end[name] == done["stats"][name]
    assert recording.header["settings"]["seed"] == 5
    assert recording.header["draft"] == (None if draft == "none" else draft)
    origins = {step["next"]["origin"] for step in recording.steps}
    assert origins == ({"plain"} if draft == "none" else origins | {"bonus", "residual"})


def test_what_the_header_says_of_a_trained_pair(tmp_path: Path, check_recording: Check) -> None:
    assert run("--prompt", "import ", "--max-tokens", 6, "--temperature", 1, "--record", tmp_path / "run.jsonl") == 0
    recording = check_recording(tmp_path / "run.jsonl")
    assert recording.header["phase"] == 2
    assert set(recording.header["environment"]["models"]) == {"stdlib-10m", "stdlib-1m"}
    assert any(len(step["residual"]["top"]) == 5 for step in recording.steps if step["residual"])


def test_a_text_that_ends_inside_its_draft(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, check_recording: Check
) -> None:
    """Draft tokens past the end are proposed and compared, and are neither counted nor emitted."""
    whole = completions(capsys, *FAKE, "--draft", "fake")[0]
    stop = whole["text"][6:9]
    done = completions(capsys, *FAKE, "--draft", "fake", "--stop", stop, "--record", tmp_path / "run.jsonl")[0]
    recording = check_recording(tmp_path / "run.jsonl")
    assert recording.footer is not None
    assert recording.footer["sequences"][0]["finish_reason"] == done["finish_reason"] == "stop"
    last = recording.steps[-1]
    assert len(last["emitted"]) <= len(last["path"])
    assert last["counted"]["accepted"] < len(last["path"]) or len(last["emitted"]) == len(last["path"])
    assert recording.tokens(0) == done["tokens"]


@pytest.mark.about("engine/record.py, Recorder.finish")
@pytest.mark.parametrize("draft", ["none", "fake:0.7"])
def test_an_interrupted_run_leaves_whole_lines(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, check_recording: Check, draft: str
) -> None:
    """Ctrl-C in the third forward of the target: two steps, and a footer that records the interruption."""
    forwards, real = [0], phase2.FakeModel.logits

    def interrupted(self: Any, hidden: torch.Tensor) -> torch.Tensor:
        forwards[0] += self.agreement == 1.0
        if forwards[0] == 3:
            raise KeyboardInterrupt
        return real(self, hidden)

    monkeypatch.setattr(phase2.FakeModel, "logits", interrupted)
    assert run(*FAKE, "--draft", draft, "--temperature", 1, "--record", tmp_path / "run.jsonl") == 130
    recording = check_recording(tmp_path / "run.jsonl")
    assert len(recording.steps) == 2
    assert recording.footer is not None
    assert not recording.footer["finished"]
    assert recording.footer["sequences"][0]["finish_reason"] == "interrupted"


@pytest.mark.about("engine/record.py, Recorder.step")
def test_a_line_is_in_the_file_when_its_step_ends(tmp_path: Path) -> None:
    llm = phase2.LLM(phase2.Options(model="fake", draft="fake:0.7", max_tokens=24, temperature=1.0))
    sequences = llm.sequences(["x y z"])
    recorder, written = Recorder(tmp_path / "run.jsonl", llm, sequences), 1
    for step in llm.run(sequences, recorder.watch):
        recorder.step(step)
        written += 1
        content = (tmp_path / "run.jsonl").read_bytes()
        assert content.endswith(b"\n")
        assert content.count(b"\n") == written
    assert written > 4


@pytest.mark.about("engine/record.py, Recorder.__init__")
def test_a_file_that_cannot_be_written(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*FAKE, "--draft", "fake:0.5", "--record", "/dev/full") == 2
    assert capsys.readouterr().err.startswith("error: --record /dev/full: cannot be written")


@pytest.mark.no_exercise
def test_what_is_wrong_in_a_recording_is_found(tmp_path: Path) -> None:
    """A changed figure, wherever it is, contradicts the rest."""
    assert run(*FAKE, "--draft", "fake:0.7", "--temperature", 1, "--record", tmp_path / "run.jsonl") == 0
    good = (tmp_path / "run.jsonl").read_text()
    at = next(n for n, line in enumerate(good.splitlines()) if json.loads(line).get("residual"))

    def changed(change: Any, number: int = at) -> list[str]:
        lines = [json.loads(line) for line in good.splitlines()]
        change(lines[number])
        (tmp_path / "bad.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return list(contradictions(read_recording(tmp_path / "bad.jsonl")))

    assert changed(lambda line: None) == []
    candidate = len(json.loads(good.splitlines()[at])["path"])  # the one that was rejected
    assert changed(lambda line: line["proposed"][candidate].update(chance=0.99))
    assert changed(lambda line: line["proposed"][candidate].update(uniform=-1.0))
    assert changed(lambda line: line["proposed"][candidate].update(target_prob=0.77))
    assert changed(lambda line: line["proposed"][candidate].update(accepted=True))
    assert changed(lambda line: line["next"].update(token=1))
    assert changed(lambda line: line["next"].update(origin="plain"))
    assert changed(lambda line: line["residual"]["top"][0].update(prob=0.123))
    assert changed(lambda line: line["residual"].update(mass=2.0))
    assert changed(lambda line: line.update(position=99))
    assert changed(lambda line: line.update(window_start=line["position"]))
    assert changed(lambda line: line.update(window_start=1))
    assert changed(lambda line: line.update(end_ms=line["start_ms"]))
    assert changed(lambda line: line.update(start_ms=0.0), -2)
    assert changed(lambda line: line.update(path=[3]))
    assert changed(lambda line: line["emitted"].append(5))
    assert changed(lambda line: line["sequences"][0].update(accepted=0), -1)
    assert changed(lambda line: line["sequences"][0].update(new_tokens=25), -1)


@pytest.mark.no_exercise
@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "is empty"),
        ("{\n", "line 1"),
        ('{"type": "step"}\n', "line 1"),
        ('{"type": "header", "schema_version": 0}\n', "schema_version is 0"),
        ('{"type": "header", "schema_version": 2}\n[]\n', "line 2"),
    ],
)
def test_what_is_no_recording_is_refused(tmp_path: Path, content: str, words: str) -> None:
    (tmp_path / "run.jsonl").write_text(content)
    with pytest.raises(UserError, match=words):
        read_recording(tmp_path / "run.jsonl")

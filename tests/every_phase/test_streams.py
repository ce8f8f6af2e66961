"""Failing streams and signals that end a run: one line, an exit status, and no written output lost."""

from __future__ import annotations

import io
import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from common.phases import Phase
from common.recording import Recording

pytestmark = pytest.mark.newest

Run = Callable[..., tuple[int, str, str]]
FULL = Path("/dev/full")
needs_full = pytest.mark.skipif(not FULL.exists(), reason="this system has no /dev/full")


@pytest.fixture
def signalled(engine: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], None]]:
    """`signalled(number)`: send this process the signal after the third step of a run."""
    usual: dict[int, Any] = {
        signal.SIGINT: signal.default_int_handler,
        signal.SIGTERM: signal.SIG_DFL,
        signal.SIGHUP: signal.SIG_DFL,
    }
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    whole = engine.LLM.run

    def prepare(number: int) -> None:
        def run(*arguments: Any, **more: Any) -> Any:
            for count, step in enumerate(whole(*arguments, **more), start=1):
                yield step
                if count == 3:
                    os.kill(os.getpid(), number)

        monkeypatch.setattr(engine.LLM, "run", run)

    yield prepare
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_leaves_a_whole_document_and_a_summary(
    phase: Phase, run: Run, signalled: Callable[[int], None], llama_folder: Path, number: int, status: int
) -> None:
    signalled(number)
    ended, out, err = run("--model", llama_folder, "--prompt", "import", "--json", "--max-tokens", "100")
    assert ended == status
    (completion,) = json.loads(out)["completions"]
    assert completion["finish_reason"] == "interrupted"
    assert 3 <= len(completion["tokens"]) <= (3 if phase.number < 5 else 65)  # a call into C++ ends by itself
    assert err.count("\n") == 1
    assert err.endswith(", interrupted\n")
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL  # as it was


def test_an_interrupted_text_is_shown_as_far_as_it_got(
    run: Run, signalled: Callable[[int], None], llama_folder: Path
) -> None:
    arguments = ["--model", llama_folder, "--prompt", "import", "--prompt", "def f", "--temperature", 1]
    whole = run(*arguments)[1]
    signalled(signal.SIGTERM)
    status, out, _ = run(*arguments)
    assert status == 143
    assert out.endswith("\n")
    first, second = out.split("--- completion 2 ---\n")
    of_first, of_second = whole.split("--- completion 2 ---\n")
    assert of_first.startswith(first.rstrip("\n"))
    assert of_second.startswith(second.rstrip("\n"))
    assert len(second) > 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_recording_of_a_run_that_a_signal_ended_has_its_footer(
    run: Run,
    signalled: Callable[[int], None],
    phase: Phase,
    tmp_path: Path,
    check_recording: Callable[[Path], Recording],
    number: int,
) -> None:
    if phase.number < 2:
        pytest.skip("this phase records nothing")
    signalled(number)
    status, _, _ = run("--model", "fake", "--draft", "fake:0.7", "--prompt", "x", "--record", tmp_path / "run.jsonl")
    assert status == 128 + number
    recording = check_recording(tmp_path / "run.jsonl")
    assert recording.footer is not None
    assert recording.footer["finished"] is False
    assert len(recording.steps) == 3


def test_stdin_that_is_no_text(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"def f\xff("), encoding="utf-8"))
    status, out, err = run()
    assert (status, out) == (2, "")
    assert err.count("\n") == 1
    assert err.startswith("error: stdin cannot be read as text")
    assert "0xff" in err
    assert "UTF-8" in err


def test_a_stdout_that_lacks_characters_gets_escapes(
    run: Run, llama_folder: Path, monkeypatch: pytest.MonkeyPatch, engine: ModuleType
) -> None:
    monkeypatch.setattr(engine.Sequence, "take_text", lambda sequence: "→ é\n")
    held = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(held, encoding="latin-1"))
    status, _, err = run("--model", llama_folder, "--prompt", "x", "--max-tokens", 1)
    assert status == 0
    assert held.getvalue() == b"\\u2192 \xe9\n\n"
    note, summary = err.splitlines()
    assert note.startswith("note: stdout takes latin-1 only")
    assert "1 tokens" in summary


@needs_full
@pytest.mark.parametrize("form", [[], ["--json"]])
def test_a_full_disk_behind_stdout(
    run: Run, llama_folder: Path, monkeypatch: pytest.MonkeyPatch, form: list[str]
) -> None:
    with FULL.open("w") as full:
        monkeypatch.setattr("sys.stdout", full)
        status, _, err = run("--model", llama_folder, "--prompt", "x", *form)
        monkeypatch.undo()
    assert status == 2
    assert err.splitlines()[-1].startswith("error: the output cannot be written to its end: No space left")
    assert "Traceback" not in err


@needs_full
def test_a_full_disk_behind_record(run: Run, phase: Phase) -> None:
    if phase.number < 2:
        pytest.skip("this phase records nothing")
    status, out, err = run("--model", "fake", "--draft", "fake:0.7", "--prompt", "x", "--record", FULL)
    assert (status, out) == (2, "")
    assert err == "error: --record /dev/full: cannot be written (No space left on device)\n"


@needs_full
def test_a_recording_is_whole_where_stdout_was_not(
    run: Run,
    phase: Phase,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    check_recording: Callable[[Path], Recording],
) -> None:
    if phase.number < 2:
        pytest.skip("this phase records nothing")
    with FULL.open("w") as full:
        monkeypatch.setattr("sys.stdout", full)
        status, _, _ = run("--model", "fake", "--draft", "fake:0.7", "--prompt", "x", "--record", tmp_path / "r.jsonl")
        monkeypatch.undo()
    assert status == 2
    assert check_recording(tmp_path / "r.jsonl").footer is not None


def test_closed_streams(run: Run, llama_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("sys.stdout", None)
        status, _, err = run("--model", llama_folder, "--prompt", "x")
    assert status == 2
    assert err.startswith("error: stdout is closed")
    assert err.count("\n") == 1
    with monkeypatch.context() as patch:
        patch.setattr("sys.stderr", None)
        status, out, _ = run("--model", llama_folder, "--prompt", "x", "--json")
    assert status == 0
    assert json.loads(out)["completions"]

"""`--record` with a cache and with C++ steps: the cache's lengths, and the tokens of the fast loop."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from common.options import run_main
from common.recording import Recording
from phase5.cli import main
from phase5.kernels import registry

Check = Callable[[Path], Recording]
NO_CPP = registry.why_not("cpp", torch.device("cpu"))
needs_cpp = pytest.mark.skipif(NO_CPP is not None, reason=f"no C++ backend here: {NO_CPP}")
TEXTS = ["--prompt", "def read_config(path):", "--max-tokens", "20", "--dtype", "float32", "--device", "cpu"]


def completions(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[list[dict[str, Any]], str]:
    with pytest.raises(SystemExit) as end:
        run_main(main, [str(argument) for argument in (*TEXTS, *arguments, "--json")])
    assert end.value.code == 0
    out, err = capsys.readouterr()
    found: list[dict[str, Any]] = json.loads(out)["completions"]
    return found, err


@needs_cpp
@pytest.mark.covering(1)
@pytest.mark.parametrize("temperature", [0, 1])
@pytest.mark.parametrize(
    "how",
    [
        ["--draft", "none"],
        ["--policy", "rejection"],
        ["--policy", "coupled"],
        ["--policy", "typical"],
        ["--controller", "cost", "--policy", "coupled"],
        ["--tree", "static"],
        ["--drafter", "ngram"],
        ["--drafter", "medusa"],
        ["--drafter", "eagle"],
        ["--drafter", "eagle", "--tree", "dynamic"],
    ],
    ids=" ".join,
)
def test_the_tokens_are_those_of_the_loop_in_cpp(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, check_recording: Check, temperature: int, how: list[str]
) -> None:
    """A recorded run makes one step per call, and a line on stderr says so."""
    arguments = ["--kernels", "cpp", "--temperature", temperature, "--seed", 3, *how]
    fast, quiet = completions(capsys, *arguments)
    recorded, err = completions(capsys, *arguments, "--record", tmp_path / "run.jsonl")
    recording = check_recording(tmp_path / "run.jsonl")
    assert recorded[0]["tokens"] == fast[0]["tokens"] == recording.tokens(0)
    assert err.count("note: --record takes steps one at a time") == 1
    assert "--record" not in quiet
    assert recording.footer is not None
    assert recording.footer["sequences"][0]["steps"] == recorded[0]["stats"]["steps"] == len(recording.steps)


@pytest.mark.parametrize("kernels", ["torch", pytest.param("cpp", marks=needs_cpp)])
@pytest.mark.parametrize("kv", ["dynamic", "static", "paged"])
@pytest.mark.parametrize("draft", ["none", "auto"])
def test_what_the_cache_holds(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, check_recording: Check, kernels: str, kv: str, draft: str
) -> None:
    """The row holds all tokens except the last, until the sequence ends and its row is free."""
    if kernels == "cpp" and kv != "static":
        pytest.skip("the C++ step writes into a static cache")
    arguments = ["--kernels", kernels, "--kv", kv, "--draft", draft, "--temperature", 1]
    arguments += ["--prompt", "\n".join(f"import module_{n}" for n in range(9))]  # long enough for a separate prefill
    done, err = completions(capsys, *arguments, "--record", tmp_path / "run.jsonl")
    recording = check_recording(tmp_path / "run.jsonl")
    assert ("--record" in err) == (kernels == "cpp")
    for number, each in enumerate(done):
        *steps, last = recording.of_sequence(number)
        assert recording.tokens(number) == each["tokens"]
        assert steps[0]["cache_before"] == last["cache_after"] == 0
        assert all(step["cache_after"] == step["position"] + len(step["emitted"]) - 1 for step in steps)
    assert all(min(step["prefill_ms"], step["verify_ms"]) >= 0 for step in recording.steps)
    assert recording.steps[0]["prefill_ms"] > 0
    assert recording.steps[-1]["prefill_ms"] == 0


def test_without_a_cache_there_is_nothing_to_hold(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, check_recording: Check
) -> None:
    _, err = completions(capsys, "--kv", "off", "--kernels", "torch", "--record", tmp_path / "run.jsonl")
    assert "--record" not in err
    recording = check_recording(tmp_path / "run.jsonl")
    for step in recording.steps:
        assert [step[name] for name in ("cache_before", "cache_after", "prefill_ms")] == [None] * 3

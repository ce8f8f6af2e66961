"""`lab kernel`: a right kernel passes, a wrong one is named, and what cannot run is an error."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from common.errors import UserError
from common.lab import kernel as command
from common.phases import ROOT
from phase5.kernels import registry
from tests.support.beside import beside

kernel = beside(5, "checks.kernel")
NO_CPP = registry.why_not("cpp", torch.device("cpu"))
needs_cpp = pytest.mark.skipif(NO_CPP is not None, reason=f"no C++ backend here: {NO_CPP}")


@needs_cpp
def test_a_step_in_cpp_is_right(capsys: pytest.CaptureFixture[str]) -> None:
    assert kernel.main(["step", "--backend", "cpp"]) == 0
    assert capsys.readouterr().out == "cpp step: 4 checks passed\n"


@needs_cpp
def test_a_wrong_kernel_is_named(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(draft_tokens: Any, draft_probs: Any, *rest: Any) -> Any:
        return right(draft_tokens, None, *rest)

    right = registry.operations("cpp")["verify_sample"]
    monkeypatch.setattr(kernel.registry, "operations", lambda backend: {"verify_sample": wrong})
    assert kernel.main(["verify_sample", "--backend", "cpp"]) == 1
    assert capsys.readouterr().out.startswith("wrong: verify_sample, ")


@needs_cpp
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["rop", "--backend", "cpp"], "cpp has no kernel 'rop'; it has sample, verify_sample and step"),
        (["rope", "--backend", "triton", "--bench"], "--bench needs a GPU"),
        (["rope"], "--backend"),
    ],
)
def test_what_cannot_run(arguments: list[str], words: str) -> None:
    if "--bench" in arguments and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(UserError, match=words):
        kernel.main(arguments)


def test_the_command_runs_it_in_its_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: dict[str, Any] = {}

    def run(line: list[str], **how: Any) -> subprocess.CompletedProcess[str]:
        seen.update(how, line=line)
        return subprocess.CompletedProcess(line, 1)

    monkeypatch.setattr(subprocess, "run", run)
    assert command.run(["rope", "--backend", "cuda"]) == 1
    assert seen["line"][1:] == ["-m", "checks.kernel", "rope", "--backend", "cuda"]
    assert seen["cwd"] == ROOT / "phase-5-kernels-kvcache"
    assert torch.cuda.is_available() or seen["env"]["SPECDEC_CUDA_EMULATOR"].endswith("checks/emulator.h")
    with pytest.raises(UserError, match="no phase here has checks/kernel"):
        command.run([], tmp_path)

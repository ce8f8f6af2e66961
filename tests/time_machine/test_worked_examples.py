"""The worked examples of CONTRIBUTING.md: a drafter, a policy and a kernel, each run as printed."""

from __future__ import annotations

import importlib.util
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from common.phases import ROOT
from common.philox import Purpose
from tests.support.beside import beside

BLOCKS = re.findall(r"^```python\n(.*?)^```", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.S | re.M)


def example(name: str, folder: Path) -> Any:
    """Import the block that defines a class or function; from a file, because Triton reads sources."""
    (block,) = (block for block in BLOCKS if re.search(rf"^(class|def) {name}\b", block, re.M))
    file = folder / f"example_{name}.py"
    file.write_text(block, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, name)


def test_every_example_is_short() -> None:
    assert len(BLOCKS) == 3
    assert all(len(block.splitlines()) < 100 for block in BLOCKS)


def generated(drafter: Any, temperature: float) -> tuple[list[list[int]], int]:
    """Return the tokens of two texts, and how many draft tokens were accepted."""
    import phase3

    llm = phase3.LLM(
        phase3.Options(model="stdlib-1m", draft="none", max_tokens=24, dtype="float32", temperature=temperature)
    )
    sequences = llm.sequences(["class A:", "def f(x):"])
    policy = phase3.SampleMatch(Purpose.DRAFT)
    steps = list(phase3.speculative.decode(llm.loaded.model, drafter, sequences, policy))
    accepted = sum(stats.accepted for step in steps for stats in step.stats)
    return [sequence.tokens for sequence in sequences], accepted


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_drafter_changes_no_token(temperature: float, tmp_path: Path) -> None:
    plain, none = generated(None, temperature)
    drafted, accepted = generated(example("FollowerDrafter", tmp_path)(), temperature)
    assert (drafted, none) == (plain, 0)
    assert accepted > 0


def test_the_policy_accepts_what_it_says(tmp_path: Path) -> None:
    policy = example("NearlyBest", tmp_path)(0.5)
    good = policy.good(torch.tensor([[0.5, 0.3, 0.2], [0.4, 0.4, 0.2]]))
    assert good.tolist() == [[True, True, False], [True, True, True]]
    assert not policy.lossless


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="the interpreter is off: there is a GPU")
def test_the_kernel_is_right(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    check = beside(5, "checks.check")
    kernel = example("rms_norm", tmp_path)
    assert check.check("rms_norm", kernel, torch.device("cpu"), full=False, dtypes=(torch.float32,))

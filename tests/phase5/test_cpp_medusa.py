"""Medusa's heads in C++ against drafters/medusa.py."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import phase5
from common.prompts import load_prompts
from phase5 import load
from phase5.drafters.medusa import MedusaHeads, MedusaShape
from phase5.kernels import cpp
from phase5.model import Transformer

pytestmark = pytest.mark.skipif(cpp.why_not() is not None, reason=str(cpp.why_not()))


@pytest.mark.parametrize(
    "shape",
    [MedusaShape(), MedusaShape(heads=3, blocks=2), MedusaShape(heads=2, blocks=0, taps=(1,), read_token=True)],
    ids=str,
)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_every_head_says_what_it_says_in_torch(
    family: str, shape: MedusaShape, make_checkpoint: Callable[..., Path]
) -> None:
    target = load(str(make_checkpoint(family)), torch.float32, torch.device("cpu")).model
    assert isinstance(target, Transformer)
    torch.manual_seed(0)
    heads = MedusaHeads(shape, target.config.width).eval()
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    fast = cpp.CppMedusa(heads, cpp.CppModel(target, "float32", 2))
    with torch.inference_mode():
        for _ in range(3):
            states = torch.randn(1, target.config.width * (1 + len(shape.taps)))
            embedded = torch.randn(1, target.config.width)
            expected = target.logits(heads(states, embedded)[:, 0])
            torch.testing.assert_close(fast.logits(states, embedded), expected, rtol=1e-4, atol=1e-4)


def test_in_a_loop_torch_computes_none_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    def accepted(kernels: str) -> int:
        chosen: Any = {"dtype": "float32", "device": "cpu", "max_tokens": 32, "drafter": "medusa", "kernels": kernels}
        llm = phase5.LLM(phase5.Options(**chosen))
        assert llm.backends.report["draft_step"] == kernels
        sequences = llm.sequences([prompt.text for prompt in load_prompts("code", "test")[:2]])
        for _ in llm.run(sequences):
            pass
        return sum(step.accepted for sequence in sequences for step in sequence.steps)

    def never(*arguments: Any) -> None:
        raise AssertionError("Medusa's heads ran in torch")

    slow = accepted("torch")
    monkeypatch.setattr("phase5.drafters.medusa.MedusaHeads.forward", never)
    fast = accepted("cpp")
    assert slow > 0
    assert slow == pytest.approx(fast, rel=0.2)

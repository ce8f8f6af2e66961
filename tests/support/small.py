"""Models small enough for statistics: a target and a draft of a few tokens that partly agree, loaded by an LLM.

made = small_session(engine, patch, draft="fake:0.7", policy="coupled")
sequences = sequences_of(engine, made, [[1, 2], [3]], samples=[0, 1])
"""

from __future__ import annotations

import dataclasses
import importlib
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor


@cache
def fake_checkpoint(package: str, name: str) -> Any:
    """Load --model fake's checkpoint, once, because reading its tokenizer takes a while."""
    return importlib.import_module(f"{package}.pair").load_fake(name)


def tables(size: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return logits of target and draft, [V * V, V], by the last two tokens."""
    generator = torch.Generator().manual_seed(seed)
    target = torch.randn(size * size, size, generator=generator) * 1.5
    return target, target + torch.randn(size * size, size, generator=generator)


def small_session(engine: Any, patch: pytest.MonkeyPatch, size: int = 12, **options: Any) -> Any:
    """Make an LLM whose fake models have `size` tokens and logits from `tables`; at temperature 1."""
    target, draft = tables(size)

    def load_fake(name: str) -> Any:
        loaded = fake_checkpoint(engine.__name__, name)
        model = engine.FakeModel(size, 256)
        table = target if name == "fake" else draft
        model.logits = lambda hidden: table[hidden[..., 0]]
        return dataclasses.replace(loaded, model=model)

    with patch.context() as within:
        within.setattr(f"{engine.__name__}.llm.load_fake", load_fake)
        chosen: dict[str, Any] = {"model": "fake", "device": "cpu", "temperature": 1.0, "max_tokens": 24, "seed": 5}
        if "kernels" in engine.Options.model_fields:
            chosen["kernels"] = "torch"
        return engine.LLM(engine.Options(**{**chosen, **options}))


def sequences_of(engine: Any, made: Any, prompts: list[list[int]], samples: list[int]) -> list[Any]:
    """Return every sample of every prompt; only the token limit ends a sequence."""
    return [engine.Sequence(prompt, made.params, engine.Ending(), sample) for prompt in prompts for sample in samples]

"""Models small enough for statistics: a target and a draft of a few tokens that partly agree, loaded by an LLM.

made = small_session(engine, patch, draft="fake:0.7", policy="coupled")
sequences = sequences_of(engine, made, [[1, 2], [3]], samples=[0, 1])

Drafters that read the target's hidden states get a small Transformer with random weights, and random heads.
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


READS_STATES = ("extrapolate", "medusa", "eagle")
SHAPES: dict[str, dict[str, Any]] = {"medusa": {"heads": 3}, "eagle": {"ffn_width": 8, "reach": 64}}


def randomise(module: Any, seed: int) -> Any:
    """The same numbers in every phase. They are large enough that every part of the module shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in sorted(module.named_parameters()):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return module.requires_grad_(False).eval()


def small_transformer(engine: Any, size: int) -> Any:
    config = engine.ModelConfig(
        family="llama", vocab_size=size, layers=1, width=8, heads=2, kv_heads=1, head_dim=4, ffn_width=8,
        context=256, norm="rms", norm_eps=1e-5, positions="rope", activation="silu", gated=True,
    )  # fmt: skip
    return randomise(engine.Transformer(config), seed=1)


def small_heads(engine: Any, kind: str, target: Any) -> Any:
    parts = importlib.import_module(f"{engine.__name__}.drafters.heads")
    return randomise(parts.build_heads(kind, SHAPES[kind], target.config), seed=2)


def small_session(engine: Any, patch: pytest.MonkeyPatch, size: int = 12, **options: Any) -> Any:
    """Make an LLM whose models have `size` tokens; fake models have logits from `tables`. At temperature 1."""
    target, draft = tables(size)
    drafter = options.get("drafter", "model")

    def load_fake(name: str) -> Any:
        loaded = fake_checkpoint(engine.__name__, name)
        if drafter in READS_STATES:
            return dataclasses.replace(loaded, model=small_transformer(engine, size))
        model = engine.FakeModel(size, 256)
        table = target if name == "fake" else draft
        model.logits = lambda hidden: table[hidden[..., 0]]
        return dataclasses.replace(loaded, model=model)

    with patch.context() as within:
        within.setattr(f"{engine.__name__}.llm.load_fake", load_fake)
        if drafter in SHAPES:
            within.setattr(f"{engine.__name__}.llm.find_heads", lambda option, target, kind: None)
            heads = lambda folder, target, kind: small_heads(engine, kind, target)  # noqa: E731
            within.setattr(f"{engine.__name__}.llm.load_heads", heads)
        chosen: dict[str, Any] = {"model": "fake", "device": "cpu", "temperature": 1.0, "max_tokens": 24, "seed": 5}
        if "kernels" in engine.Options.model_fields:
            chosen["kernels"] = "torch"
        return engine.LLM(engine.Options(**{**chosen, **options}))


def sequences_of(
    engine: Any, made: Any, prompts: list[list[int]], samples: list[int], seeds: list[int] | None = None
) -> list[Any]:
    """Return every sample of every prompt; only the token limit ends a sequence. seeds: of each prompt."""
    params = [dataclasses.replace(made.params, seed=seed) for seed in seeds or [made.params.seed] * len(prompts)]
    each = list(zip(prompts, params, strict=True))
    return [engine.Sequence(prompt, mine, engine.Ending(), sample) for prompt, mine in each for sample in samples]

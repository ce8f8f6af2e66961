"""Greedy float32 output equals phase 1's: 100 prompts, every kind of cache, with and without a draft."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import phase1
import phase5
from common.errors import UserError
from common.prompts import load_prompts
from phase5.kernels import registry

PROMPTS = [prompt.text for prompt in load_prompts("code", "test")][:100]
COMMON: dict[str, Any] = {"dtype": "float32", "device": "cpu", "max_tokens": 24}
DRAFTING: dict[str, dict[str, Any]] = {"plain": {"draft": "none"}, "speculative": {"draft": "auto", "k": 4}}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.no_exercise,
]  # `lab check` has the quick form of it in test_cached_runner.py


def decoded(made: Any, prompts: list[str]) -> list[phase5.Sequence]:
    """Decode prompts one by one: rounding depends on the batch."""
    sequences: list[phase5.Sequence] = [each for prompt in prompts for each in made.sequences([prompt])]
    for sequence in sequences:
        for _ in made.run([sequence]):
            pass
    return sequences


def written(sequences: list[phase5.Sequence]) -> list[list[int]]:
    return [sequence.tokens for sequence in sequences]


def differing(found: list[list[int]], expected: list[list[int]]) -> list[int]:
    return [at for at, (mine, other) in enumerate(zip(found, expected, strict=True)) if mine != other]


def some_fell(sequences: list[phase5.Sequence]) -> bool:
    """Check that some draft tokens were accepted and some rejected; otherwise equality proves little."""
    steps = [step for sequence in sequences for step in sequence.steps]
    accepted, proposed = sum(step.accepted for step in steps), sum(step.proposed for step in steps)
    return bool(0 < accepted < proposed)


@pytest.fixture(scope="module")
def expected() -> list[list[int]]:
    return written(decoded(phase1.LLM(phase1.Options(**COMMON)), PROMPTS))


@pytest.mark.parametrize("how", list(DRAFTING))
@pytest.mark.parametrize(
    ("kernels", "kind"),
    [
        ("torch", "off"),
        ("torch", "dynamic"),
        ("torch", "static"),
        ("torch", "paged"),
        pytest.param(
            "cpp",
            "static",
            marks=pytest.mark.skipif(
                registry.why_not("cpp", torch.device("cpu")) is not None,
                reason=f"no C++ backend here: {registry.why_not('cpp', torch.device('cpu'))}",
            ),
        ),
    ],
)
def test_the_trained_model(kernels: str, kind: str, how: str, expected: list[list[int]]) -> None:
    assert len(expected) == 100
    options: dict[str, Any] = {"kernels": kernels, "kv": kind, **DRAFTING[how], **COMMON}
    if kind != "off":
        options["kv_dtype"] = "float32"
    sequences = decoded(phase5.LLM(phase5.Options(**options)), PROMPTS)
    assert differing(written(sequences), expected) == []
    assert some_fell(sequences) == (how == "speculative")


SHORT = [prompt[:40] for prompt in PROMPTS]


@pytest.fixture(scope="module")
def windowed(make_checkpoint: Callable[..., Path]) -> tuple[str, list[list[int]]]:
    """Return a model with a window of 8 tokens, and phase 1's output with it."""
    folder = str(make_checkpoint("mistral"))
    return folder, written(decoded(phase1.LLM(phase1.Options(model=folder, **COMMON)), SHORT))


@pytest.mark.parametrize("kind", ["off", "dynamic", "static", "ring", "paged"])
@pytest.mark.parametrize("how", ["plain", "all accepted", "ngram"])
def test_a_model_with_window_attention(how: str, kind: str, windowed: tuple[str, list[list[int]]]) -> None:
    """`ring` needs such models. The model as its own draft is always accepted, n-grams sometimes."""
    folder, expected = windowed
    drafting: dict[str, dict[str, Any]] = {
        "plain": {"draft": "none"},
        "all accepted": {"draft": folder, "k": 4},
        "ngram": {"drafter": "ngram", "k": 4},
    }
    options: dict[str, Any] = {"model": folder, "kernels": "torch", "kv": kind, **drafting[how], **COMMON}
    sequences = decoded(phase5.LLM(phase5.Options(**options)), SHORT)
    assert differing(written(sequences), expected) == []
    assert some_fell(sequences) == (how == "ngram")


def test_ring_is_refused_for_the_trained_model() -> None:
    made = phase5.LLM(phase5.Options(kernels="torch", kv="ring", draft="none", **COMMON))
    with pytest.raises(UserError, match="--kv ring overwrites tokens before the window, and this model was not"):
        made.generate(PROMPTS[:1])

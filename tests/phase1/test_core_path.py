"""The functions of the exercise's core path, each alone."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import phase1
from phase1 import context, forward, rope, sampling
from phase1.generate import decode_step


@pytest.fixture(scope="module")
def llm() -> phase1.LLM:
    return phase1.LLM(phase1.Options(model="stdlib-1m", dtype="float32"))


def params(**given: float) -> sampling.SamplingParams:
    return sampling.SamplingParams(**{"temperature": 1.0, **given})  # type: ignore[arg-type]


@pytest.mark.about("engine/context.py, window_start")
def test_the_window_jumps_by_a_quarter_of_the_context() -> None:
    assert [context.window_start(length, 16) for length in (1, 16, 17, 20, 21, 24, 25)] == [0, 0, 4, 4, 8, 8, 12]


@pytest.mark.about("engine/rope.py, rotate")
def test_a_rotation_by_hand() -> None:
    """Features 0 and 2, and 1 and 3, are pairs: (a, b) -> (a cos - b sin, b cos + a sin)."""
    x = torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 1, 1, 4)
    angles = torch.tensor([[math.pi / 2, 0.0]])
    cos, sin = (table[:, None] for table in rope.rotation_tables(angles, 1.0, torch.float32))
    turned = rope.rotate(x, cos, sin).flatten().tolist()
    assert turned == pytest.approx([-3.0, 2.0, 1.0, 4.0], abs=1e-6)


@pytest.mark.about("engine/model.py, Attention.forward")
def test_attention_is_that_of_torch(llm: phase1.LLM) -> None:
    """Without RoPE, and with a causal mask; key / value heads are repeated for their group of queries."""
    attention: Any = llm.loaded.model.layers[0].attention
    config = llm.loaded.config
    x = torch.randn(2, 5, config.width, generator=torch.Generator().manual_seed(0))
    mask = llm.loaded.model.mask(5, x, None)
    group = config.heads // config.kv_heads

    def heads(projected: torch.Tensor, count: int) -> torch.Tensor:
        return projected.view(2, 5, count, config.head_dim).transpose(1, 2)

    with torch.inference_mode():
        query = heads(attention.query(x), config.heads)
        key, value = (heads(of(x), config.kv_heads) for of in (attention.key, attention.value))
        if config.qk_norm:
            query, key = attention.query_norm(query), attention.key_norm(key)
        key, value = (each.repeat_interleave(group, dim=1) for each in (key, value))
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        expected = attention.output(mixed.transpose(1, 2).reshape(2, 5, -1))
        got = attention(x, None, mask.repeat(group, 1)[None])
    assert torch.allclose(got, expected, atol=1e-5)


@pytest.mark.about("engine/forward.py, next_logits")
def test_padding_changes_no_logits(llm: phase1.LLM) -> None:
    """Rows of different lengths in one batch have the logits that each has alone."""
    rows = [[5, 6, 7], [8], [9, 10, 11, 12, 13]]
    together = forward.next_logits(llm.loaded.model, rows)
    alone = torch.cat([forward.next_logits(llm.loaded.model, [row]) for row in rows])
    assert together.shape == (3, llm.loaded.config.vocab_size)
    assert torch.allclose(together, alone, atol=1e-4)


@pytest.mark.about("engine/sampling.py, penalise")
def test_penalties_by_hand() -> None:
    logits = torch.tensor([[2.0, -2.0, 1.0, 1.0]])
    got = sampling.penalise(logits, [params(repetition_penalty=2.0)], [[0]], [[1]])
    assert got.tolist() == [[1.0, -4.0, 1.0, 1.0]]
    got = sampling.penalise(logits, [params(presence_penalty=0.5, frequency_penalty=0.25)], [[0]], [[3, 3, 1]])
    assert got.tolist() == [[2.0, -2.75, 1.0, 0.0]]
    assert logits.tolist() == [[2.0, -2.0, 1.0, 1.0]]


@pytest.mark.about("engine/sampling.py, probabilities")
@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, [0.5, 0.3, 0.15, 0.05]),
        ({"temperature": 0.0}, [1.0, 0.0, 0.0, 0.0]),
        ({"temperature": 0.5}, [0.25 / 0.365, 0.09 / 0.365, 0.0225 / 0.365, 0.0025 / 0.365]),
        ({"top_k": 2}, [0.625, 0.375, 0.0, 0.0]),
        ({"top_p": 0.6}, [0.625, 0.375, 0.0, 0.0]),
        ({"min_p": 0.25}, [0.5 / 0.95, 0.3 / 0.95, 0.15 / 0.95, 0.0]),
    ],
)
def test_a_distribution_by_hand(given: dict[str, float], expected: list[float]) -> None:
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    got = sampling.probabilities(logits, [params(**given)])
    assert got[0].tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.about("engine/generate.py, decode_step")
def test_a_step_appends_the_most_likely_tokens(llm: phase1.LLM) -> None:
    sequences = llm.sequences(["import ", "class Stack:"])
    expected = forward.next_logits(llm.loaded.model, [each.prompt for each in sequences]).argmax(-1).tolist()
    logits = decode_step(llm.loaded.model, sequences, sampling.KeyedSampler())
    assert [each.tokens for each in sequences] == [[token] for token in expected]
    assert logits.argmax(-1).tolist() == expected

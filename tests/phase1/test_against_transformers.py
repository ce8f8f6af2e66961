"""Greedy decoding gives transformers' tokens, on trained models and real prompts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import phase1
from common.peers import TransformersPeer
from common.prompts import load_prompts

CPU = torch.device("cpu")


def check_greedy(folder: str, texts: list[str], new_tokens: int) -> list[list[int]]:
    loaded = phase1.load(folder, torch.float32, CPU)
    peer = TransformersPeer(loaded.checkpoint.folder, torch.float32, CPU)
    params = phase1.SamplingParams(max_new_tokens=new_tokens)
    outputs = []
    for start in range(0, len(texts), 8):
        prompts = [loaded.tokenizer.encode(text) for text in texts[start : start + 8]]
        ours = phase1.generate(loaded.model, prompts, params, loaded.ending)
        for prompt, generation in zip(prompts, ours, strict=True):
            assert generation.tokens == peer.generate([prompt], new_tokens, use_cache=True)[0]
            outputs.append(generation.tokens)
    return outputs


def test_4_code_prompts() -> None:
    prompts = load_prompts("code")
    outputs = check_greedy("stdlib-10m", [prompt.text for prompt in prompts[::50]], 24)
    assert len({tuple(tokens) for tokens in outputs}) == 4  # different prompts have different continuations


@pytest.mark.slow
def test_all_200_code_prompts() -> None:
    outputs = check_greedy("stdlib-10m", [prompt.text for prompt in load_prompts("code")], 64)
    assert len(outputs) == 200


@pytest.fixture(scope="module", params=["gpt2", "opt"])
def briefly_trained(request: pytest.FixtureRequest, make_checkpoint: Callable[..., Path]) -> Path:
    """Train a tiny model for a hundred steps on code: a random one only repeats itself and proves little."""
    folder = make_checkpoint(request.param, initializer_range=0.02)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = phase1.load(str(folder), torch.float32, CPU).tokenizer
    stream = torch.tensor(tokenizer.encode("\n".join(p.text + p.continuation for p in load_prompts("code")[:40])))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    generator = torch.Generator().manual_seed(0)
    model.train()
    for _ in range(120):
        starts = torch.randint(len(stream) - 64, (16,), generator=generator)
        batch = torch.stack([stream[s : s + 64] for s in starts])
        loss = model(batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < 4.5  # a flat guess over 320 tokens is 5.8
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("count", "tokens"), [(12, 24), pytest.param(40, 48, marks=pytest.mark.slow)])
def test_briefly_trained_gpt2_and_opt(briefly_trained: Path, count: int, tokens: int) -> None:
    texts = [prompt.text[:40] for prompt in load_prompts("code")[:count]]
    outputs = check_greedy(str(briefly_trained), texts, tokens)
    assert len({tuple(tokens) for tokens in outputs}) > count / 3


def test_ragged_batches_equal_single_runs_on_the_embedded_model() -> None:
    """Four prompts of 8 to 32 tokens, greedy and sampled."""
    loaded = phase1.load("stdlib-10m", torch.float32, CPU)
    texts = [prompt.text for prompt in load_prompts("code", "test")[3:10:2]]
    prompts = [loaded.tokenizer.encode(text)[: 8 * row] for row, text in enumerate(texts, 1)]
    for temperature in (0.0, 1.0):
        params = phase1.SamplingParams(temperature=temperature, max_new_tokens=12)
        together = phase1.generate(loaded.model, prompts, params, loaded.ending)
        for prompt, generation in zip(prompts, together, strict=True):
            assert phase1.generate(loaded.model, [prompt], params, loaded.ending)[0].tokens == generation.tokens

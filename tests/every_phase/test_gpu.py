"""On a GPU: the same tokens as on the CPU, in every phase."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

from common.prompts import load_prompts

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_same_tokens_as_on_the_processor(engine: ModuleType, temperature: float) -> None:
    """float32, plain decoding: greedy, and sampled with the same keyed noise."""
    texts = [prompt.text for prompt in load_prompts("code", "test")[:4]]
    tokens = {}
    for name in ("cpu", "cuda"):
        loaded = engine.load("stdlib-10m", torch.float32, torch.device(name))
        params = engine.SamplingParams(temperature=temperature, max_new_tokens=32)
        prompts = [loaded.tokenizer.encode(text) for text in texts]
        tokens[name] = [g.tokens for g in engine.generate(loaded.model, prompts, params, loaded.ending)]
    assert tokens["cuda"] == tokens["cpu"]


def test_a_session_on_the_card_equals_plain_decoding(engine: ModuleType) -> None:
    """With each phase's default way of decoding, greedy output equals the plain loop's."""
    text = load_prompts("code", "test")[0].text
    options = {"prompt": [text], "device": "cuda", "dtype": "float32", "max_tokens": 32}
    llm = engine.LLM(engine.Options(**options))
    (done,) = llm.generate([text])
    params = engine.SamplingParams(max_new_tokens=32)
    prompt = llm.loaded.tokenizer.encode(text)
    (plain,) = engine.generate(llm.loaded.model, [prompt], params, llm.loaded.ending)
    assert done.tokens == plain.tokens


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_runs(engine: ModuleType, dtype: torch.dtype) -> None:
    loaded = engine.load("stdlib-10m", dtype, torch.device("cuda"))
    prompt = loaded.tokenizer.encode(load_prompts("code", "test")[0].text)
    (done,) = engine.generate(loaded.model, [prompt], engine.SamplingParams(max_new_tokens=16), loaded.ending)
    assert len(done.tokens) == 16

"""On a GPU: speculative output equals plain output, on all prompts, in every dtype, on every backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from common.prompts import load_prompts
from phase5.kernels import registry

KINDS: dict[str, dict[str, Any]] = {
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "float16": {"dtype": "float16"},
    "int8": {"dtype": "bfloat16", "quant": "int8"},
    "int4": {"dtype": "bfloat16", "quant": "int4"},
    "int8 cache": {"dtype": "bfloat16", "kv_dtype": "int8"},
}
HOW: dict[str, dict[str, Any]] = {"chain": {"k": 5}, "tree": {"k": 4, "tree": "static", "tree_nodes": 12}}
TOGETHER = 10  # prompts of a batch


def tokens(llm: Any, texts: list[str]) -> list[list[int]]:
    batches = [texts[at : at + TOGETHER] for at in range(0, len(texts), TOGETHER)]
    return [done.tokens for batch in batches for done in llm.generate(batch)]


@pytest.mark.gpu
@pytest.mark.parametrize("backend", registry.FOR_CARDS)
@pytest.mark.parametrize("kind", list(KINDS))
def test_greedy_speculation_writes_what_plain_decoding_writes(
    kind: str, backend: Any, llm_on: Callable[..., Any]
) -> None:
    device = torch.device("cuda")
    reason = registry.why_not(backend, device)
    if reason is not None:
        pytest.skip(f"{backend}: {reason}")
    kernels = registry.choose(backend, device).kernels
    texts = [prompt.text for half in ("calibrate", "test") for prompt in load_prompts("code", half)]
    options = {"device": "cuda", "max_tokens": 32, **KINDS[kind]}
    plain = llm_on(kernels, **options)
    expected = tokens(plain, texts)
    for name, how in HOW.items():
        found = tokens(llm_on(kernels, **options, draft="auto", **how), texts)
        different = [number for number, pair in enumerate(zip(found, expected, strict=True)) if pair[0] != pair[1]]
        assert not different, f"{name}: prompts {different[:5]}"

"""On a GPU: replayed graphs write what steps one by one write, on all prompts, with at most one host read a step."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import phase6
from common.prompts import load_prompts
from phase6.kernels import registry

KINDS: dict[str, dict[str, Any]] = {
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "float16": {"dtype": "float16"},
    "int8": {"dtype": "bfloat16", "quant": "int8"},
    "int4": {"dtype": "bfloat16", "quant": "int4"},
    "int8 cache": {"dtype": "bfloat16", "kv_dtype": "int8"},
}
HOW: dict[str, dict[str, Any]] = {
    "plain": {"draft": "none"},
    "greedy": {"k": 4},
    "coupled": {"k": 4, "temperature": 1.0, "policy": "coupled"},
    "rejection": {"k": 4, "temperature": 1.0},
}


@pytest.mark.gpu
@pytest.mark.parametrize("backend", registry.FOR_CARDS)
@pytest.mark.parametrize("how", list(HOW))
@pytest.mark.parametrize("kind", list(KINDS))
def test_replays_write_what_single_steps_write(kind: str, how: str, backend: Any) -> None:
    reason = registry.why_not(backend, torch.device("cuda"))
    if reason is not None:
        pytest.skip(f"{backend}: {reason}")
    texts = [prompt.text for half in ("calibrate", "test") for prompt in load_prompts("code", half)]
    found = []
    for mode in ("off", "on"):
        options: dict[str, Any] = {"device": "cuda", "kernels": backend, "max_tokens": 32, "cuda_graph": mode}
        llm = phase6.LLM(phase6.Options(**{**options, **KINDS[kind], **HOW[how]}))
        found.append([done.tokens for done in llm.generate(texts)])
    assert found[0] == found[1]
    graphs = llm.backends.graphs
    assert graphs is not None
    assert graphs.stats.replays > 0
    assert graphs.stats.host_reads <= graphs.stats.replays

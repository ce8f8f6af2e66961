"""A whole engine on interpreted Triton kernels: speculative output equals plain output, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import phase5
from phase5.kernels import TORCH, Kernels, registry

PROMPTS = ["import os", "def f(x):\n", "class A:", "x"]
KINDS: dict[str, dict[str, Any]] = {
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "float16": {"dtype": "float16"},
    "int8": {"dtype": "bfloat16", "quant": "int8"},
    "int4": {"dtype": "bfloat16", "quant": "int4", "quant_group": 32},
    "int8 cache": {"dtype": "bfloat16", "kv_dtype": "int8"},
}
slow = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(make_checkpoint: Callable[..., Path]) -> str:
    wide = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    return str(make_checkpoint("llama", **wide))


@pytest.fixture(scope="module")
def tiny(make_checkpoint: Callable[..., Path]) -> str:
    """One layer, one key head: each program of a kernel takes milliseconds here."""
    narrow = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 1}
    return str(make_checkpoint("llama", num_hidden_layers=1, **narrow))


@pytest.fixture
def kernels(interpreted: None) -> Kernels:
    return registry.choose("triton", torch.device("cpu")).kernels


@pytest.fixture
def llm(kernels: Kernels, folder: str, llm_on: Callable[..., Any]) -> Callable[..., Any]:
    """Return an LLM on Triton kernels."""
    return lambda **options: llm_on(kernels, **{"model": folder, "device": "cpu", **options})


def decoded(llm: Any, prompts: list[str] = PROMPTS) -> list[phase5.Sequence]:
    sequences: list[phase5.Sequence] = llm.sequences(prompts)
    for _ in llm.run(sequences):
        pass
    return sequences


def tokens(llm: Any, prompts: list[str] = PROMPTS) -> list[list[int]]:
    return [each.tokens for each in decoded(llm, prompts)]


@pytest.mark.parametrize("kind", [k if k == "bfloat16" else pytest.param(k, marks=slow) for k in KINDS])
@pytest.mark.parametrize("count", [2, pytest.param(len(PROMPTS), marks=slow)])
def test_greedy_speculation_writes_what_plain_decoding_writes(kind: str, count: int, llm: Any, tiny: str) -> None:
    plain = tokens(llm(model=tiny, **KINDS[kind]), PROMPTS[:count])
    drafted = decoded(llm(model=tiny, draft=tiny, draft_quant="int8", k=4, **KINDS[kind]), PROMPTS[:count])
    assert [sequence.tokens for sequence in drafted] == plain
    accepted = sum(stats.accepted for sequence in drafted for stats in sequence.steps)
    assert accepted > 8  # otherwise no forward pass verified a draft


@slow
@pytest.mark.parametrize("kv", ["dynamic", "paged"])
@pytest.mark.parametrize("kind", list(KINDS))
def test_in_every_cache(kind: str, kv: str, llm: Any, folder: str) -> None:
    plain = tokens(llm(kv=kv, **KINDS[kind]))
    assert tokens(llm(kv=kv, draft=folder, draft_quant="int8", k=6, **KINDS[kind])) == plain


@slow
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize(
    "how", [{"tree": "static", "tree_nodes": 7, "k": 3}, {"tree": "dynamic", "tree_nodes": 7, "k": 3}]
)
def test_trees(kind: str, how: dict[str, Any], llm: Any, folder: str) -> None:
    plain = tokens(llm(**KINDS[kind]))
    assert tokens(llm(draft=folder, draft_quant="int8", **how, **KINDS[kind])) == plain


@slow
@pytest.mark.parametrize("policy", ["coupled", "rejection"])
@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
def test_at_temperature_1(kind: str, policy: str, llm: Any, folder: str) -> None:
    """With `coupled` no token changes; with rejection sampling the kernel accepts as the reference does."""
    options = {"temperature": 1.0, "top_p": 0.95, "policy": policy, "max_tokens": 12, **KINDS[kind]}
    drafting = llm(draft=folder, draft_quant="int8", k=4, **options)
    found = tokens(drafting)
    if policy == "coupled":
        assert found == tokens(llm(**options))
    else:
        registry.use(drafting.policy, TORCH)
        assert found == tokens(drafting)


@slow
@pytest.mark.parametrize("family", ["gpt2", "opt", "qwen3", "mistral", "mixed"])
def test_other_families(family: str, llm: Any, make_checkpoint: Callable[..., Path]) -> None:
    """Window attention, norms of queries and keys, biases, learned positions."""
    mixed = {"use_sliding_window": True, "sliding_window": 8, "layer_types": ["full_attention", "sliding_attention"]}
    other = str(make_checkpoint("qwen3", **mixed) if family == "mixed" else make_checkpoint(family))
    kinds = ["static", "ring"] if family == "mistral" else ["static"]
    for kv in kinds:
        plain = tokens(llm(model=other, kv=kv, dtype="bfloat16", max_tokens=16))
        drafting = llm(model=other, kv=kv, dtype="bfloat16", max_tokens=16, draft=other, k=4)
        assert tokens(drafting) == plain


def test_in_float32_torch_writes_the_same(llm: Any, folder: str) -> None:
    plain = tokens(llm(dtype="float32", max_tokens=4), PROMPTS[:2])
    torch_alone = phase5.LLM(
        phase5.Options(model=folder, max_tokens=4, device="cpu", draft="none", dtype="float32", kv="off")
    )
    assert tokens(torch_alone, PROMPTS[:2]) == plain

"""A whole engine on emulated CUDA kernels: speculative output equals plain output, bit for bit."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import phase5
from phase5.kernels import Kernels, registry

PROMPTS = ["import os", "def f(left, right):\n    return", "class A:", "x"]
KINDS: dict[str, dict[str, Any]] = {
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "float16": {"dtype": "float16"},
    "int8": {"dtype": "bfloat16", "quant": "int8"},
    "int4": {"dtype": "bfloat16", "quant": "int4", "quant_group": 32},
    "int8 cache": {"dtype": "bfloat16", "kv_dtype": "int8"},
}


@pytest.fixture(scope="module")
def folder(make_checkpoint: Callable[..., Path]) -> str:
    wide = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    return str(make_checkpoint("llama", **wide))


@pytest.fixture
def kernels(emulate: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch) -> Kernels:
    emulate(monkeypatch)
    return registry.choose("cuda", torch.device("cpu")).kernels


@pytest.fixture
def llm(
    kernels: Kernels, folder: str, llm_on: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Any]:
    # On a CPU the loader changes the strides of matrices for its products; on a GPU, as here, rows are contiguous.
    loader = importlib.import_module("phase5.load")
    monkeypatch.setattr(loader, "reserve", lambda shape, dtype, device: torch.empty(shape, dtype=dtype))
    return partial(llm_on, kernels, **{"model": folder, "device": "cpu", "quant_head": False})


def decoded(llm: Any) -> list[phase5.Sequence]:
    sequences: list[phase5.Sequence] = llm.sequences(PROMPTS)
    for _ in llm.run(sequences):
        pass
    return sequences


def tokens(llm: Any) -> list[list[int]]:
    return [each.tokens for each in decoded(llm)]


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=pytest.mark.slow) if kind in ("float16", "int8") else kind for kind in KINDS]
)
def test_greedy_speculation_writes_what_plain_decoding_writes(kind: str, llm: Any, folder: str) -> None:
    plain = tokens(llm(**KINDS[kind]))
    drafted = decoded(llm(draft=folder, draft_quant="int8", k=4, **KINDS[kind]))
    assert [sequence.tokens for sequence in drafted] == plain
    accepted = sum(stats.accepted for sequence in drafted for stats in sequence.steps)
    assert accepted > 8  # otherwise no forward pass verified a draft


@pytest.mark.slow
@pytest.mark.parametrize("kv", ["dynamic", "paged"])
@pytest.mark.parametrize("kind", list(KINDS))
def test_in_every_cache(kind: str, kv: str, llm: Any, folder: str) -> None:
    plain = tokens(llm(kv=kv, **KINDS[kind]))
    assert tokens(llm(kv=kv, draft=folder, draft_quant="int8", k=6, **KINDS[kind])) == plain


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("tree", ["static", "dynamic"])
def test_trees(kind: str, tree: str, llm: Any, folder: str) -> None:
    plain = tokens(llm(**KINDS[kind]))
    assert tokens(llm(draft=folder, draft_quant="int8", k=3, tree=tree, tree_nodes=7, **KINDS[kind])) == plain


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gpt2", "opt", "qwen3", "mistral", "mixed"])
def test_other_families(family: str, llm: Any, make_checkpoint: Callable[..., Path]) -> None:
    """Window attention, norms of queries and keys, biases, learned positions."""
    mixed = {"use_sliding_window": True, "sliding_window": 8, "layer_types": ["full_attention", "sliding_attention"]}
    other = str(make_checkpoint("qwen3", **mixed) if family == "mixed" else make_checkpoint(family))
    for kv in ["static", "ring"] if family == "mistral" else ["static"]:
        plain = tokens(llm(model=other, kv=kv, dtype="bfloat16", max_tokens=16))
        drafting = llm(model=other, kv=kv, dtype="bfloat16", max_tokens=16, draft=other, k=4)
        assert tokens(drafting) == plain

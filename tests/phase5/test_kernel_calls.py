"""Every op of the registry is called, end to end, on the kernels that were asked for by name.

The host does not wait for the mask of a chain.
"""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import phase5
from phase5.attention import beside_padding, seen
from phase5.kernels import TORCH, Kernels, key_ranges, metadata, registry
from phase5.kernels.fused import PARTS
from phase5.kernels.key_ranges import in_order
from phase5.kv_cache import CacheShape, DynamicCache, RingCache, StaticCache

CPU = torch.device("cpu")
LONG = "import os, sys, re, json\n" * 4  # longer than a step: a prefill, whose last layer asks for one position
RUNS: list[tuple[str, dict[str, Any]]] = [
    (LONG, {"draft": "itself"}),
    ("x", {"temperature": 1.0, "quant": "int8"}),
    ("x", {"draft": "itself", "policy": "rejection", "temperature": 1.0, "kv_dtype": "int8"}),
    ("x", {"draft": "itself", "policy": "coupled", "temperature": 1.0}),
]


@pytest.fixture(scope="module")
def tiny(make_checkpoint: Callable[..., Path]) -> str:
    narrow = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    return str(make_checkpoint("llama", num_hidden_layers=2, **narrow))


def counted(calls: Counter[str], op: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*arguments: Any, **more: Any) -> Any:
        calls[op] += 1
        return function(*arguments, **more)

    return call


def counting(backend: str, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Count the calls of each op of a backend."""
    module, calls = importlib.import_module(f"phase5.kernels.{backend}"), Counter[str]()
    ops = {op: counted(calls, op, function) for op, function in module.ops().items()}
    monkeypatch.setattr(module, "ops", lambda: ops)
    return calls


def run(tiny: str, backend: str, prompt: str, **options: Any) -> phase5.LLM:
    if options.get("draft") == "itself":
        options.update(draft=tiny, k=3)
    told = {"model": tiny, "device": "cpu", "kernels": backend, "draft": "none", "max_tokens": 4, **options}
    llm = phase5.LLM(phase5.Options(**told))
    llm.generate([prompt])
    return llm


def all_are_called(tiny: str, backend: str, calls: Counter[str]) -> None:
    for prompt, options in RUNS:
        report = run(tiny, backend, prompt, **options).backends.report
        assert report["ops"] == dict.fromkeys(Kernels._fields, backend), options
        assert not report["by_parts"], options
    assert set(calls) == set(Kernels._fields), f"never called: {set(Kernels._fields) - set(calls)}"


def test_every_triton_kernel_is_called(tiny: str, interpreted: None, monkeypatch: pytest.MonkeyPatch) -> None:
    all_are_called(tiny, "triton", counting("triton", monkeypatch))


def test_every_cuda_kernel_is_called(
    tiny: str, emulate: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    emulate(monkeypatch)
    # On a CPU the loader changes the strides of matrices for its products; on a GPU, as here, rows are contiguous.
    loader = importlib.import_module("phase5.load")
    monkeypatch.setattr(loader, "reserve", lambda shape, dtype, device: torch.empty(shape, dtype=dtype))
    all_are_called(tiny, "cuda", counting("cuda", monkeypatch))


def test_torch_calls_the_parts_and_says_so(tiny: str) -> None:
    calls = Counter[str]()
    llm = phase5.LLM(phase5.Options(model=tiny, device="cpu", kernels="torch", draft=tiny, k=3, max_tokens=4))
    assert llm.backends.report["by_parts"] == {op: list(parts) for op, parts in PARTS.items()}
    others = {op: function for op, function in TORCH._asdict().items() if op not in PARTS}  # the model knows torch's
    kernels = TORCH._replace(**{op: counted(calls, op, function) for op, function in others.items()})
    for target in (llm.loaded.model, llm.policy):
        registry.use(target, kernels)
    llm.generate([LONG])
    assert {"add_rms_norm", "verify_greedy", *(part for parts in PARTS.values() for part in parts)} <= set(calls)


@pytest.mark.parametrize("held", [0, 5, 255, 256, 300])
@pytest.mark.parametrize("kind", ["static", "dynamic", "ring"])
def test_the_mask_of_a_chain_is_not_read(kind: str, held: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Properties known without reading a mask equal the mask itself. Rows of a batch, one shorter; another alone."""
    shape, how = CacheShape(1, 1, 4), (torch.float32, torch.float32, CPU)
    cache: Any = RingCache(shape, 3, 350, *how)
    if kind != "ring":
        cache = StaticCache(shape, 3, 400, *how) if kind == "static" else DynamicCache(shape, 3, *how)
    for row in range(3):
        for start in range(0, held, 16):
            count = min(16, held - start)
            cache.make_room(row, count)
            cache.append(0, row, torch.zeros(count, 1, 4), torch.zeros(count, 1, 4))
            cache.keep(row, list(range(count)))
    like, W, rows, counts = torch.zeros(1), 6, [2, 0, 1], [6, 4, 1]
    masks = []
    for row, count in zip(rows, counts, strict=True):
        cache.make_room(row, count)
        mask = seen(range(held, held + count), 0, held, None, None, like)
        masks.append(mask if mask is None or count == W else beside_padding(mask, W, held))
    at = metadata.metadata_of("test", cache, rows, counts, CPU)
    copies = [None if mask is None else mask.clone() for mask in masks]
    assert [mask if mask is None else list(mask.shape) for mask in masks] == [[6, held + 6], [6, held + 4], None]
    wanted = key_ranges._make("test", at, copies, W)
    reads = Counter[str]()
    monkeypatch.setattr(key_ranges, "_extent", lambda open_: reads.update(["a mask"]))
    found = key_ranges._make("test", at, masks, W)
    assert not reads
    assert (found.lo.tolist(), found.end.tolist(), found.furthest, found.lines) == (
        wanted.lo.tolist(), wanted.end.tolist(), wanted.furthest, None
    )  # fmt: skip


def test_what_is_not_in_the_table_is_read() -> None:
    """A slice with another start, or a modified copy, has other properties."""
    mask = in_order(4, 10, torch.zeros(1))
    assert key_ranges.is_in_order(mask, 10)
    assert not key_ranges.is_in_order(mask, 9)
    assert not key_ranges.is_in_order(mask.clone(), 10)
    assert not key_ranges.is_in_order(in_order(4, 10, torch.zeros(1).half()), 9)
    assert not key_ranges.is_in_order(mask.T, 10)

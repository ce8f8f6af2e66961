"""Every op of the registry is called, end to end, on the kernels that were asked for by name.

What queries see follows from positions and parents on the host.
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
from phase5.kernels import TORCH, Kernels, key_ranges, metadata, registry
from phase5.kernels.fused import PARTS
from phase5.kv_cache import CacheShape, DynamicCache, RingCache, StaticCache
from phase5.transfers import Upload

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


def stored(kind: str, held: int) -> Any:
    """A cache of three rows of `held` tokens."""
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
    return cache


@pytest.mark.parametrize("window", [None, 7, 350])
@pytest.mark.parametrize("held", [0, 5, 255, 256, 300])
@pytest.mark.parametrize("kind", ["static", "dynamic", "ring"])
@pytest.mark.about("engine/kernels/key_ranges.py, masks_of")
def test_masks_show_what_the_ranges_show(kind: str, held: int, window: int | None) -> None:
    """Of a chain, a shorter chain, a tree, and their padding: each mask against what every query sees by definition."""
    cache, rows, W = stored(kind, held), [2, 0, 1], 6
    parents = [list(range(-1, 5)), list(range(-1, 3)), [-1, 0, 0, 2, 1]]
    counts = [len(each) for each in parents]
    for row, count in zip(rows, counts, strict=True):
        cache.make_room(row, count)
    paths = [key_ranges.paths_of(held, each) for each in parents]
    assert [path is None for path in paths] == [True, True, False]
    at = metadata.attention_metadata(cache, rows, counts, Upload(CPU), W, {window}, paths)
    for r, mask in enumerate(at.masks(at.ranges[window], torch.zeros(1))):
        assert mask is not None
        for w in range(W):
            line, node = list[int](), min(w, counts[r] - 1)
            while node >= 0:
                line.append(node)
                node = parents[r][node]
            seen = [*range(held), *(held + at for at in line[::-1])][-window if window else 0 :]
            assert (mask[w] == 0).nonzero()[:, 0].tolist() == seen, (r, w)


def test_ranges_of_chains_and_trees_are_made_without_a_read(monkeypatch: pytest.MonkeyPatch) -> None:
    cache, upload = stored("static", 20), Upload(CPU)
    paths = [None, key_ranges.paths_of(20, [-1, 0, 0])]
    at = metadata.attention_metadata(cache, [0, 1], [3, 3], upload, windows={None, 4}, paths=paths)
    sent = list[int]()
    copied = upload.copied

    def counted(host: torch.Tensor) -> torch.Tensor:
        sent.append(len(host))
        return copied(host)

    monkeypatch.setattr(upload, "copied", counted)
    assert at.ranges[None].lo.tensor.tolist() == [[0] * 3] * 2
    assert at.ranges[None].end.tensor.tolist() == [[21, 22, 23], [21, 22, 22]]
    assert at.ranges[4].lo.tensor.tolist() == [[17, 18, 19], [17, 18, 18]]
    base, lines = at.ranges[4].base, at.ranges[4].lines
    assert base is not None
    assert lines is not None
    assert base.tensor.tolist() == [23, 20]
    assert lines.tensor.tolist() == [[[0, 0]] * 3, [[20, 0], [20, 21], [20, 22]]]
    assert at.at.tensor.tolist() == [[0, 1], [20, 20], [3, 3]]
    assert len(sent) == 1  # all in one copy

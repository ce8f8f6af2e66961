"""The caches of an LLM: allocated once for its life, replaced when too small, and free after every run."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch

import phase5
from common.device import memory
from phase5.kv_cache import PagedCache, StaticCache
from phase5.sampling import SamplingParams

PROMPTS = ["import os", "from pathlib import"]


def llm(**wanted: Any) -> phase5.LLM:
    wanted = {"model": "stdlib-1m", "dtype": "float32", "max_tokens": 8, **wanted}
    return phase5.LLM(phase5.Options(**wanted))


@pytest.mark.parametrize("options", [{}, {"kernels": "torch"}, {"kernels": "torch", "kv": "paged"}], ids=str)
def test_three_calls_allocate_one_cache_for_each_model(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = list[object]()
    for kind in (StaticCache, PagedCache):
        first = kind.__init__

        def counted(self: object, *arguments: Any, first: Any = first) -> None:
            made.append(self)
            first(self, *arguments)

        monkeypatch.setattr(kind, "__init__", counted)
    ours = llm(draft="stdlib-1m", k=2, **options)
    texts = [[done.tokens for done in ours.generate(PROMPTS)] for _ in range(3)]
    assert texts[0] == texts[1] == texts[2]
    assert len(made) == 2, "one for the target and one for the draft"


def test_a_cache_that_is_too_small_is_freed_before_the_larger_one_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = llm(draft="none", kernels="torch")
    short = ours.generate(PROMPTS[:1])[0].tokens
    (small,) = (weakref.ref(manager.cache) for manager in ours.caches.values())
    freed, make = list[bool](), StaticCache.__init__

    def noticed(self: StaticCache, *arguments: Any) -> None:
        freed.append(small() is None)
        make(self, *arguments)

    monkeypatch.setattr(StaticCache, "__init__", noticed)
    params = SamplingParams(max_new_tokens=32)
    long = ours.generate(PROMPTS, params)
    assert freed == [True], "the old cache still takes memory"
    assert long[0].tokens[:8] == short
    (large,) = ours.caches.values()
    assert ours.generate(PROMPTS[:1])[0].tokens == short
    assert list(ours.caches.values()) == [large], "a larger cache serves a smaller request"


@pytest.mark.parametrize("kernels", ["torch", "auto"])
def test_two_runs_at_once_do_not_share_rows(kernels: str) -> None:
    ours = llm(draft="none", kernels=kernels)
    alone = [ours.generate([prompt])[0].text for prompt in PROMPTS]
    streams = [ours.stream(prompt) for prompt in PROMPTS]
    texts = ["", ""]
    for _ in range(8):
        for number, stream in enumerate(streams):
            texts[number] += next(stream, "")
    texts = [text + "".join(stream) for text, stream in zip(texts, streams, strict=True)]
    assert texts == alone


def test_an_abandoned_run_frees_its_rows() -> None:
    ours = llm(draft="stdlib-1m", k=2, temperature=1.0)
    whole = ours.generate(PROMPTS)
    loop = ours.run(ours.sequences(PROMPTS))
    next(loop)
    assert not any(manager.idle for manager in ours.caches.values())
    loop.close()  # type: ignore[attr-defined]
    assert all(manager.idle for manager in ours.caches.values())
    assert [done.tokens for done in ours.generate(PROMPTS)] == [done.tokens for done in whole]


@pytest.mark.parametrize("calls", [200, pytest.param(1000, marks=pytest.mark.slow)])
def test_many_calls_leave_memory_flat(calls: int) -> None:
    ours, device = llm(max_tokens=2, temperature=1.0), torch.device("cpu")
    sizes = []
    for number in range(calls):
        ours.generate(PROMPTS[:1])
        if number in (calls // 5, calls - 1):
            gc.collect()
            sizes.append(memory(device)["rss"])
    assert sizes[1] - sizes[0] < 4, f"{sizes[1] - sizes[0]:.1f} MiB more after the first fifth of the calls"

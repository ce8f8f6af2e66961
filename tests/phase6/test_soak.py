"""Many short requests through one engine: nothing grows, and a step takes no longer at the end."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable

import pytest

import phase6
from common.device import memory
from tests.support.served import Pair


@pytest.mark.slow
def test_ten_thousand_requests_leave_memory_and_steps_as_they_were(pair: Callable[..., Pair]) -> None:
    made = pair("cpp", "model")
    engine = made.engine(rows=8, pages=48)
    params = phase6.SamplingParams(max_new_tokens=4, ignore_eos=True, temperature=1.0)
    times, used, sent = list[float](), list[float](), 0
    while sent < 10_000 or engine.busy:
        while sent < 10_000 and len(engine.scheduler.waiting) < 8:
            engine.add_request(
                [5 + sent % 7, 20 + sent % 200, *range(30, 30 + sent % 30)], params, k=2, seeded=sent % 2 == 0
            )
            sent += 1
        began = time.thread_time()
        engine.step()
        times.append(time.thread_time() - began)
        if len(times) % 500 == 0:
            gc.collect()
            used.append(memory(engine.target.model.embedding.weight.device)["rss"])
    fifth = len(times) // 5
    assert statistics.median(times[-fifth:]) < 1.3 * statistics.median(times[fifth : 2 * fifth])
    assert used[-1] - used[1] < 16  # MiB
    assert not engine.requests
    assert not engine.target.manager.rows
    assert len(engine.target.manager.cache.blocks.named) <= 48

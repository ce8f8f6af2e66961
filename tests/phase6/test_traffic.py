"""What is counted as communication between ranks, and the latency of a message alone."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import phase6
from phase6.parallel import traffic, worker
from phase6.parallel.messages import Ping
from phase6.parallel.traffic import Passage, ping, seconds_of, trace
from tests.support.ranks import end, groups, logits_of, split
from tests.support.served import WHY_NOT_CPP


def test_a_wait_for_computation_is_no_communication() -> None:
    """A message begins when the last rank has come, and ends when the last rank has its numbers."""
    seen = [
        [Passage("all", 8, 1.0, 3.5), Passage("0 to 1", 4, 5.0, 5.125), Passage("all", 8, 6.0, 8.0)],
        [Passage("all", 8, 3.0, 3.25), Passage("0 to 1", 4, 4.0, 5.5), Passage("all", 8, 7.0, 7.5)],
    ]
    assert seconds_of(seen) == {("all", 8): [0.5, 1.0], ("0 to 1", 4): [0.5]}


@pytest.mark.parametrize(("gather", "turns"), [(True, False), (False, False), (False, True)])
def test_pings_are_traced_on_every_rank(gather: bool, turns: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses = list[float]()
    monkeypatch.setattr(traffic, "busy", pauses.append)
    first, second = groups("gather", 2)
    other = threading.Thread(target=worker.serve, args=(second, phase6.Options(device="cpu")), daemon=True)
    other.start()
    began = time.perf_counter()
    for _ in range(2):  # a trace begins anew
        trace(first, True)
        first.tell(what := Ping(gather, 5, 3, 0.001, turns))
        ping(first, what)
        found = seconds_of(trace(first, False))
        kinds = [("all", 5)] if gather else [("0 to 1", 5), ("1 to 0", 5)]
        assert {kind: len(seconds) for kind, seconds in found.items()} == {("plan", 0): 1} | dict.fromkeys(kinds, 3)
        assert all(0 <= each < time.perf_counter() - began for seconds in found.values() for each in seconds)
    each = 2 if gather or turns else 3  # both ranks, and the last one before it answers; in turns only then
    assert pauses == [0.001] * (2 * 3 * each)
    assert first.traffic.passages is None
    assert second.traffic.passages is None
    first.close()
    other.join(60)
    assert not other.is_alive()


def test_busy_takes_its_time() -> None:
    began = time.perf_counter()
    traffic.busy(0.02)
    assert time.perf_counter() - began >= 0.02


@pytest.mark.skipif(WHY_NOT_CPP is not None, reason=str(WHY_NOT_CPP))
@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ({"tensor_parallel": 2}, {"all": 4 * 3 + 2}),
        ({"tensor_parallel": 2, "tensor_mode": "reduce"}, {"all": 2 * 3 + 2}),
        ({"pipeline_parallel": 3}, {"0 to 1": 2, "1 to 2": 2, "2 to 0": 2}),
        ({"pipeline_parallel": 3, "micro_batches": 1}, {"0 to 1": 1, "1 to 2": 1, "2 to 0": 1}),
    ],
    ids=str,
)
def test_messages_of_a_step(
    make_checkpoint: Callable[..., Path], how: dict[str, Any], expected: dict[str, int]
) -> None:
    """4 exchanges per layer and 2 besides with gather, 2 and 2 with reduce; one per rank and micro-batch of layers."""
    folder = make_checkpoint("llama", hidden_size=64, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=3)
    chosen: dict[str, Any] = {"dtype": "float32", "device": "cpu", "threads": 1, "draft": "none", **how}
    llm, threads = split(phase6.Options(model=str(folder), **chosen))
    params = phase6.SamplingParams(max_new_tokens=5, ignore_eos=True)
    logits_of(llm, [[5, 6], [7, 8]], params)  # makes the cache
    trace(llm.group, True)
    _, logits = logits_of(llm, [[5, 6], [7, 8]], params)
    seen = trace(llm.group, False)
    counts = Counter[str]()
    for (kind, _), seconds in seconds_of(seen).items():
        counts[kind] += len(seconds)
    assert counts == {kind: count * len(logits) for kind, count in ({"plan": 1} | expected).items()}
    end(llm, threads)

"""Times GPU kernels without launch overhead, and with inputs from memory rather than the L2 cache.

A kernel of ten microseconds ends before Python launches the next. So several launches, each with its own inputs, are
recorded as a CUDA graph and replayed; their inputs exceed the GPU's cache.

    seconds = replay(record([call] * copies))()
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from functools import cache

import torch

from common.benchmark import Outcome
from common.harness import Variant
from common.prompts import Prompt

from .runs import Lab

FLUSHED = 512 << 20  # bytes, more than any GPU's cache
COPIED, ROUNDS = 1 << 30, 20
Replay = Callable[[], float]  # runs the prepared calls, and returns their seconds


def copies_for(nbytes: int, most: int = 32) -> int:
    """Return how many copies of inputs of this size exceed the GPU's cache."""
    return max(2, min(most, -(-FLUSHED // nbytes)))


def record(calls: Sequence[Callable[[], object]]) -> torch.cuda.CUDAGraph:
    """Call everything once, to initialise it, then record the calls in a graph."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


def replay(graph: torch.cuda.CUDAGraph) -> Replay:
    """Return a function that replays the graph and returns its seconds by the GPU's clock."""

    def run() -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        return float(begin.elapsed_time(end)) / 1e3

    return run


def alone(calls: Sequence[Callable[[], object]], device: torch.device) -> Replay:
    """Return a function that makes the calls one by one and returns their seconds, launches included."""

    def run() -> float:
        torch.cuda.synchronize(device)
        began = time.perf_counter()
        for call in calls:
            call()
        torch.cuda.synchronize(device)
        return time.perf_counter() - began

    return run


def on_card(make: Callable[[], Replay], calls: int, nbytes: int, bandwidth: float) -> Variant:
    """Return a variant of `calls` calls that each move `nbytes`, on a GPU that copies at `bandwidth` bytes/s."""

    def run(prompt: Prompt | None, round_: int) -> Outcome:
        figures = {"gb": calls * nbytes / 1e9, "bandwidth_s": calls * nbytes / bandwidth}
        return Outcome(calls, figures, seconds=make()())

    return run


def measure_copy(lab: Lab) -> float:
    """Measure torch's copy of 1 GiB, in bytes read and written per second, as rows of `copy`."""

    @cache
    def made() -> Replay:
        source = torch.empty(COPIED, dtype=torch.uint8, device=lab.device).zero_()
        target = torch.empty_like(source)
        return replay(record([lambda: target.copy_(source)] * 2))

    def copy() -> Outcome:
        return Outcome(2, {"gb": 4 * COPIED / 1e9}, seconds=made()())

    for number in range(ROUNDS):
        lab.count("copy", {}, "torch's copy", f"copy {number}", copy)
    rates = [row.figures["gb"] * 1e9 / row.seconds for row in lab.rows("copy") if row.seconds]
    return statistics.median(rates) if rates else 1e12  # of a dry run

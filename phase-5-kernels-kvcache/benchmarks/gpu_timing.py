"""Timing kernels on a card: captured in a graph, so that starting them costs nothing, and from memory, not a cache.

A kernel that takes ten microseconds is over before Python has started the next. So some launches, each on inputs of its
own, are recorded once (a CUDA graph) and replayed as one; together their inputs are larger than the card's cache.

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

FLUSHED = 512 << 20  # bytes that no card's cache holds
COPIED, ROUNDS = 1 << 30, 20
Replay = Callable[[], float]  # runs what was prepared: its seconds


def copies_for(nbytes: int, most: int = 32) -> int:
    """How many inputs of this size go through memory in turn before one comes back."""
    return max(2, min(most, -(-FLUSHED // nbytes)))


def record(calls: Sequence[Callable[[], object]]) -> torch.cuda.CUDAGraph:
    """One after the other, in a graph; each was called before, so all that is made once has been made."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


def replay(graph: torch.cuda.CUDAGraph) -> Replay:
    """Replays the graph: its seconds by the card's own clock."""

    def run() -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        return float(begin.elapsed_time(end)) / 1e3

    return run


def alone(calls: Sequence[Callable[[], object]], device: torch.device) -> Replay:
    """Makes the calls one by one: their seconds, launches and answers included."""

    def run() -> float:
        torch.cuda.synchronize(device)
        began = time.perf_counter()
        for call in calls:
            call()
        torch.cuda.synchronize(device)
        return time.perf_counter() - began

    return run


def on_card(make: Callable[[], Replay], calls: int, nbytes: int, bandwidth: float) -> Variant:
    """A variant of `calls` calls that must each move so many bytes, on a card that copies at `bandwidth` bytes/s."""

    def run(prompt: Prompt | None, round_: int) -> Outcome:
        figures = {"gb": calls * nbytes / 1e9, "bandwidth_s": calls * nbytes / bandwidth}
        return Outcome(calls, figures, seconds=make()())

    return run


def measure_copy(lab: Lab) -> float:
    """Bytes read and written per second by torch's own copy of 1 GiB: what kernels are held against. Rows of `copy`."""

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

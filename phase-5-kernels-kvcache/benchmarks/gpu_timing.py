"""Timing kernels on a card: captured in a graph, so that starting them costs nothing, and from memory, not a cache.

A kernel that takes ten microseconds is over before Python has started the next. So some launches, each on inputs of its
own, are recorded once (a CUDA graph) and replayed as one; together their inputs are larger than the card's cache.

    python -c "import torch; from benchmarks.gpu_timing import *; print(copy_bandwidth(torch.device('cuda')))"
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from common.benchmark import median

FLUSHED = 512 << 20  # bytes that no card's cache holds
ROUNDS = 20


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


def seconds_each(graphs: dict[str, torch.cuda.CUDAGraph], calls: int, rounds: int = ROUNDS) -> dict[str, list[float]]:
    """Of every graph of `calls` calls, the seconds of one call, round by round; the graphs take turns."""
    times: dict[str, list[float]] = {name: [] for name in graphs}
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    names = list(graphs)
    for number in range(-1, rounds):  # the first is not counted
        first = max(number, 0) % len(names)
        for name in names[first:] + names[:first]:
            begin.record()
            graphs[name].replay()
            end.record()
            torch.cuda.synchronize()
            if number >= 0:
                times[name].append(begin.elapsed_time(end) / 1e3 / calls)
    return times


def copy_bandwidth(device: torch.device) -> float:
    """Bytes read and written per second by torch's own copy of 1 GiB, the median: what kernels are held against."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device=device).zero_()
    target = torch.empty_like(source)
    graph = record([lambda: target.copy_(source)] * 2)
    return 2 * source.nbytes / median(seconds_each({"copy": graph}, 2)["copy"])

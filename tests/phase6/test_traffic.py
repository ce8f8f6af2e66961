"""What is counted as communication between ranks, and the latency of a message alone."""

from __future__ import annotations

import threading
import time

import pytest

import phase6
from phase6.parallel import worker
from phase6.parallel.messages import Ping
from phase6.parallel.traffic import Passage, ping, seconds_of, trace
from tests.support.ranks import groups


def test_a_wait_for_computation_is_no_communication() -> None:
    """A message begins when the last rank has come, and ends when the last rank has its numbers."""
    seen = [
        [Passage("all", 8, 1.0, 3.5), Passage("0 to 1", 4, 5.0, 5.125), Passage("all", 8, 6.0, 8.0)],
        [Passage("all", 8, 3.0, 3.25), Passage("0 to 1", 4, 4.0, 5.5), Passage("all", 8, 7.0, 7.5)],
    ]
    assert seconds_of(seen) == {("all", 8): [0.5, 1.0], ("0 to 1", 4): [0.5]}


@pytest.mark.parametrize("gather", [True, False])
def test_pings_are_traced_on_every_rank(gather: bool) -> None:
    first, second = groups("gather", 2)
    other = threading.Thread(target=worker.serve, args=(second, phase6.Options(device="cpu")), daemon=True)
    other.start()
    began = time.perf_counter()
    for _ in range(2):  # a trace begins anew
        trace(first, True)
        first.tell(what := Ping(gather, 5, 3, 0.001))
        ping(first, what)
        found = seconds_of(trace(first, False))
        kinds = [("all", 5)] if gather else [("0 to 1", 5), ("1 to 0", 5)]
        assert {kind: len(seconds) for kind, seconds in found.items()} == {("plan", 0): 2} | dict.fromkeys(kinds, 3)
        assert all(0 <= each < time.perf_counter() - began for seconds in found.values() for each in seconds)
    assert time.perf_counter() - began > 2 * 3 * 0.001  # a pause before each
    assert first.traffic.passages is None
    assert second.traffic.passages is None
    first.close()
    other.join(60)
    assert not other.is_alive()

"""Clocks of the profiler: on a GPU events, which are read after the run, so that no range makes the host wait.

clock = clock_of(torch.device("cpu"))
began, ended = clock.now(), clock.now()
clock.settle()
print(clock.ms(began, ended))
"""

from __future__ import annotations

import time
from typing import Any, Protocol

import torch

from common.device import synchronize


class Clock(Protocol):
    name: str

    def now(self) -> Any:
        """Return a moment. On a device it is the one at which all work launched before has ended."""
        ...

    def settle(self) -> None:
        """Wait until all moments have passed; only then is `ms` known."""
        ...

    def ms(self, began: Any, ended: Any) -> float: ...


class HostClock:
    """The clock of the host, which waits for a device where there are no events."""

    name = "host"

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def now(self) -> float:
        synchronize(self.device)
        return time.perf_counter()

    def settle(self) -> None:
        """Do nothing: the host's times are known at once."""

    def ms(self, began: float, ended: float) -> float:
        return (ended - began) * 1e3


class EventClock:
    """CUDA events on the current stream."""

    name = "events"

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def now(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def settle(self) -> None:
        torch.cuda.synchronize(self.device)

    def ms(self, began: torch.cuda.Event, ended: torch.cuda.Event) -> float:
        return float(began.elapsed_time(ended))


def clock_of(device: torch.device) -> Clock:
    return EventClock(device) if device.type == "cuda" else HostClock(device)

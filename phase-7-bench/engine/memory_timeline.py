"""The memory of this process over time, sampled by a thread: host memory, and torch's allocator on a device.

timeline = MemoryTimeline(device, lambda: "load")
timeline.start()
llm = LLM(options)
timeline.end()
print(max(timeline.samples, key=lambda sample: sample["rss"]))
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import torch

from common.device import MIB, memory

KEPT = 4000  # most samples: above that every other one is dropped, and the sampling rate halves


def allocator(device: torch.device) -> dict[str, float]:
    """Return the memory that torch's allocator has reserved, in MiB: its tensors, and freed blocks that it keeps."""
    if device.type == "cuda":
        return {"cuda_reserved": torch.cuda.memory_reserved(device) / MIB}
    if device.type == "mps":
        return {"mps_reserved": torch.mps.driver_allocated_memory() / MIB}
    return {}


class MemoryTimeline(threading.Thread):
    """Samples from `start` to `end`: `ms`, `range` (the result of `label`), and figures in MiB.

    The names of the figures are those of common.device.memory and of `allocator`.
    """

    def __init__(self, device: torch.device, label: Callable[[], str], pause: float = 0.01) -> None:
        super().__init__(name="memory timeline", daemon=True)
        self.device, self.label, self.pause = device, label, pause  # seconds between two samples
        self.samples: list[dict[str, Any]] = []
        self._over = threading.Event()
        self._began = time.perf_counter()

    def run(self) -> None:
        self._take()
        while not self._over.wait(self.pause):
            self._take()
        self._take()

    def end(self) -> None:
        self._over.set()
        self.join()

    def _take(self) -> None:
        now, range_ = (time.perf_counter() - self._began) * 1e3, self.label()
        self.samples.append({"ms": now, "range": range_, **memory(self.device), **allocator(self.device)})
        if len(self.samples) > KEPT:
            del self.samples[1::2]
            self.pause *= 2

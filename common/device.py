"""Choose device and dtype, wait for a device, and measure memory.

python -c "from common.device import resolve_device, memory; print(memory(resolve_device('auto')))"
"""

from __future__ import annotations

import re
import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TypeVar

import psutil
import torch

from common.errors import UserError
from common.limits import room

T = TypeVar("T")
MIB = 2**20
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def available_devices() -> list[str]:
    """List the kinds of device this process can use, the fastest first: cuda and mps if present, and always cpu."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    return [name for name, usable in there.items() if usable]


def resolve_device(name: str) -> torch.device:
    """Return the device for auto|cpu|cuda|mps; auto is the first available of cuda, mps, cpu.

    Raises UserError for another name and for an unavailable device: there is no silent fallback.
    """
    there = available_devices()
    if name == "auto":
        return torch.device(there[0])
    if name not in ("cpu", "cuda", "mps"):
        raise UserError(f"unknown device {name!r}; use auto, cpu, cuda or mps (this machine has {', '.join(there)})")
    if name not in there:
        raise UserError(f"device {name!r} is not there; this machine has {', '.join(there)} (auto picks {there[0]})")
    return torch.device(name)


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the dtype for auto|float32|bfloat16|float16 on a device.

    auto is float32 on a CPU, bfloat16 on a CUDA device with bfloat16 hardware, float16 on other devices. Raises
    UserError for another name.
    """
    if name in DTYPES:
        return DTYPES[name]
    if name != "auto":
        raise UserError(f"unknown dtype {name!r}; use auto, {', '.join(DTYPES)}")
    if device.type == "cpu":
        return torch.float32
    # Older GPUs emulate bfloat16 more slowly than float32; by default torch counts emulation as support.
    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16
    return torch.float16


def dtype_name(dtype: torch.dtype) -> str:
    """Return `float32` for torch.float32, and so on: the name in options and result files."""
    return str(dtype).removeprefix("torch.")


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished all its work; without this, a clock times only the launches."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Let torch compute with so many threads inside, and with as many as before afterwards; 0 changes nothing."""
    before = torch.get_num_threads()
    if count:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def each_within(context: Callable[[], AbstractContextManager[object]], steps: Iterator[T]) -> Iterator[T]:
    """Yield the same steps, each computed inside a context of its own; the caller's code runs outside of it."""
    while True:
        with context():
            try:
                step = next(steps)
            except StopIteration:
                return
        yield step


def _linux_peak() -> int | None:
    """Return the highest resident size since the start or the last reset, in bytes; None if /proc does not tell."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    peak = re.search(r"^VmHWM:\s+(\d+) kB", status, re.MULTILINE)
    return int(peak[1]) * 1024 if peak else None


def _peak_rss() -> int:
    """Return the highest resident size of this process, in bytes."""
    # Not getrusage first: on Linux its peak starts at the size of the process that called exec, and cannot be reset.
    peak = _linux_peak()
    if peak is None:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return peak


def memory(device: torch.device) -> dict[str, float]:
    """Return this process's memory in MiB: `rss` and `peak_rss` on the host, and torch's tensors on the device.

    The latter are `cuda_allocated` and `cuda_peak` on a CUDA device, `mps_allocated` on MPS (which records no peak).
    """
    rss = psutil.Process().memory_info().rss
    used = {"rss": rss, "peak_rss": max(rss, _peak_rss())}
    if device.type == "cuda":
        used["cuda_allocated"] = torch.cuda.memory_allocated(device)
        used["cuda_peak"] = torch.cuda.max_memory_allocated(device)
    elif device.type == "mps":
        used["mps_allocated"] = torch.mps.current_allocated_memory()
    return {name: size / MIB for name, size in used.items()}


def available_memory(device: torch.device) -> int:
    """Return the bytes that tensors on this device may still allocate.

    On a CPU, and on MPS, which shares its memory: the host's free memory, or the limits of this process if smaller.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free)
    host, limited = int(psutil.virtual_memory().available), room()
    return host if limited is None else min(host, limited)


def reset_peak(device: torch.device) -> bool:
    """Restart the peaks at the present use. False: `peak_rss` stays the peak since the process began.

    Linux can restart a process's peak; macOS, and containers that guard /proc, cannot. `cuda_peak` always restarts.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # 5: the peak resident size, see proc(5)
    except OSError:
        return False
    return _linux_peak() is not None

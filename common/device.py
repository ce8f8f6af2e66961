"""Where and in which number format to compute, how to wait for a device, and how much memory is in use.

python -c "from common.device import resolve_device, memory; print(memory(resolve_device('auto')))"
"""

from __future__ import annotations

import re
import resource
import sys
from pathlib import Path

import psutil
import torch

from common.errors import UserError
from common.limits import room

MIB = 2**20
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def available_devices() -> list[str]:
    """The kinds of device this process can use, the fastest first: some of cuda and mps, and always cpu."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    return [name for name, usable in there.items() if usable]


def resolve_device(name: str) -> torch.device:
    """The device for auto|cpu|cuda|mps; auto is the first of cuda, mps, cpu that is there.

    Raises UserError for another name, and for a device that is not there: no silent fallback.
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
    """The number format for auto|float32|bfloat16|float16 on a device.

    auto is float32 on a CPU, bfloat16 on a CUDA device that has it in hardware, float16 on other devices. Raises
    UserError for another name.
    """
    if name in DTYPES:
        return DTYPES[name]
    if name != "auto":
        raise UserError(f"unknown dtype {name!r}; use auto, {', '.join(DTYPES)}")
    if device.type == "cpu":
        return torch.float32
    # Older cards emulate bfloat16, which is slower than float32; torch counts that as support unless told not to.
    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16
    return torch.float16


def dtype_name(dtype: torch.dtype) -> str:
    """`float32` for torch.float32, and so on: the name that options and result files use."""
    return str(dtype).removeprefix("torch.")


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all that was asked of it; without this, a clock times only the asking."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def _linux_peak() -> int | None:
    """The highest resident size since the start or the last reset, in bytes; None where /proc does not tell."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    peak = re.search(r"^VmHWM:\s+(\d+) kB", status, re.MULTILINE)
    return int(peak[1]) * 1024 if peak else None


def _peak_rss() -> int:
    """The highest resident size of this process, in bytes."""
    # Not getrusage first: on Linux its peak begins at the size of the process that called exec, and never falls.
    peak = _linux_peak()
    if peak is None:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return peak


def memory(device: torch.device) -> dict[str, float]:
    """Memory of this process in MiB: `rss` and `peak_rss` on the host, and what torch's tensors take on the device.

    The latter are `cuda_allocated` and `cuda_peak` on a CUDA device, `mps_allocated` on MPS (which keeps no peak).
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
    """Bytes that tensors on this device may still take.

    On a CPU, and on MPS, which shares its memory: what the host has, or the limits of this process if they leave less.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free)
    host, limited = int(psutil.virtual_memory().available), room()
    return host if limited is None else min(host, limited)


def reset_peak(device: torch.device) -> bool:
    """Start the peaks anew at what is in use now. False: `peak_rss` stays the peak since the process began.

    Linux can restart a process's peak; macOS, and containers that guard /proc, cannot. `cuda_peak` always restarts.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # 5: the peak resident size, see proc(5)
    except OSError:
        return False
    return _linux_peak() is not None

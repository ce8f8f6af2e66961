"""Memory limits of this process: its cgroup's (a container's), and RLIMIT_AS (`ulimit -v`).

The host may have more memory: psutil reports the host alone, and a process beyond its cgroup's limit is killed.

python -c "from common.limits import room; print(room())"
"""

from __future__ import annotations

import re
import resource
from collections.abc import Iterator
from pathlib import Path

import psutil

MEMBERSHIP = Path("/proc/self/cgroup")  # lines of `number:controllers:path`, see cgroups(7)
MOUNT = Path("/sys/fs/cgroup")
# For versions 2 and 1: the files with the limit and the use, and memory.stat's name of droppable file pages.
VERSIONS = {
    "": ("memory.max", "memory.current", "inactive_file"),
    "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}
UNLIMITED = 2**62  # version 1 writes a number near 2^63


def _read(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:
        return ""


def _groups() -> Iterator[tuple[Path, str]]:
    """Yield the folders of this process's memory cgroups, outer ones included, each with its version's controller."""
    for line in _read(MEMBERSHIP).splitlines():
        _, controllers, path = line.split(":", 2)
        for controller in VERSIONS:
            if controller not in controllers.split(","):
                continue
            mount = MOUNT / controller
            # In a container the path can be the host's; then only the mount's own folder exists.
            inner = mount / path.lstrip("/")
            for folder in (inner, *inner.parents):
                yield folder, controller
                if folder == mount:
                    break


def _left(folder: Path, controller: str) -> int | None:
    """Return the bytes that a cgroup leaves; None without a limit."""
    names = VERSIONS[controller]
    limit = _read(folder / names[0]).strip()
    if not limit.isdecimal() or int(limit) >= UNLIMITED:  # no such file, `max`, or what version 1 says instead
        return None
    used, droppable = _read(folder / names[1]).strip(), names[2]
    if not used.isdecimal():
        return None
    found = re.search(rf"^{droppable} (\d+)$", _read(folder / "memory.stat"), re.MULTILINE)
    return int(limit) - int(used) + (int(found[1]) if found else 0)


def room() -> int | None:
    """Return the bytes that this process's limits leave; None without limits."""
    left = [each for group in _groups() if (each := _left(*group)) is not None]
    addresses, _ = resource.getrlimit(resource.RLIMIT_AS)
    if addresses != resource.RLIM_INFINITY:
        left.append(addresses - psutil.Process().memory_info().vms)
    return max(0, min(left)) if left else None

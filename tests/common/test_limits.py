"""The memory that a process's limits leave: cgroups of both versions, and RLIMIT_AS."""

from __future__ import annotations

import resource
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch

from common import limits
from common.device import available_memory

Put = Callable[..., None]


@pytest.fixture
def put(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Put:
    """`put("0::/a/b", {"a/memory.max": "100"})`: write /proc/self/cgroup and files under /sys/fs/cgroup."""
    monkeypatch.setattr(limits, "MEMBERSHIP", tmp_path / "membership")
    monkeypatch.setattr(limits, "MOUNT", tmp_path / "mount")
    unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    monkeypatch.setattr(resource, "getrlimit", lambda which: unlimited)

    def write(membership: str, files: dict[str, str]) -> None:
        (tmp_path / "membership").write_text(membership + "\n")
        for name, text in files.items():
            file = tmp_path / "mount" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text + "\n")

    return write


def test_without_a_limit_there_is_none(put: Put) -> None:
    assert limits.room() is None  # no files at all, as on macOS
    put("0::/", {"memory.max": "max", "memory.current": "5"})
    assert limits.room() is None


def test_version_2_counts_what_can_be_dropped_as_free(put: Put) -> None:
    stat = "anon 10\nfile 30\ninactive_file 25\nactive_file 5"
    put("0::/job", {"job/memory.max": "100", "job/memory.current": "40", "job/memory.stat": stat})
    assert limits.room() == 100 - 40 + 25


def test_the_tightest_of_the_groups_around_it_counts(put: Put) -> None:
    inner = {"a/b/memory.max": "100", "a/b/memory.current": "10"}
    put("0::/a/b", {**inner, "a/memory.max": "50", "a/memory.current": "45", "memory.max": "1000"})
    assert limits.room() == 5


def test_version_1_and_a_path_that_only_the_host_has(put: Put) -> None:
    """In a container the membership is the host's path, and the mount is the container's own group."""
    files = {"memory/memory.limit_in_bytes": "300", "memory/memory.usage_in_bytes": "100"}
    stat = {"memory/memory.stat": "inactive_file 1\ntotal_inactive_file 20"}
    put("5:cpu,cpuacct:/docker/1\n4:memory:/docker/1\n0::/docker/1", {**files, **stat})
    assert limits.room() == 220


def test_of_a_group_without_a_limit_nothing_else_is_read(put: Put, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every file takes microseconds, and every run asks."""
    unlimited = {"memory/memory.limit_in_bytes": "9223372036854771712", "memory/memory.usage_in_bytes": "100"}
    put("4:memory:/a\n0::/", {**unlimited, "memory.max": "max", "memory.current": "5"})
    names, read = list[str](), limits._read

    def noted(file: Path) -> str:
        names.append(file.name)
        return read(file)

    monkeypatch.setattr(limits, "_read", noted)
    assert limits.room() is None
    wanted = ["membership", "memory.limit_in_bytes", "memory.limit_in_bytes", "memory.max"]
    assert names == wanted  # of /a, which does not exist, and of the group around it


def test_nothing_is_left_past_a_limit(put: Put) -> None:
    put("0::/", {"memory.max": "100", "memory.current": "140"})
    assert limits.room() == 0


def test_available_memory_is_the_least_of_all(put: Put, monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    put("0::/", {"memory.max": "max", "memory.current": "5"})
    host = available_memory(cpu)
    assert host == pytest.approx(psutil.virtual_memory().available, rel=0.5)
    put("0::/", {"memory.max": str(64 * 2**20), "memory.current": str(24 * 2**20)})
    assert available_memory(cpu) == 40 * 2**20
    vms = psutil.Process().memory_info().vms
    monkeypatch.setattr(resource, "getrlimit", lambda which: (vms + 16 * 2**20, resource.RLIM_INFINITY))
    assert available_memory(cpu) == pytest.approx(16 * 2**20, abs=8 * 2**20)

"""Device and dtype names resolve without silent fallbacks; the memory figures are about this process."""

from __future__ import annotations

import mmap
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from common import device as module
from common.device import (
    dtype_name,
    each_within,
    memory,
    reset_peak,
    resolve_device,
    resolve_dtype,
    synchronize,
    torch_threads,
)
from common.errors import UserError

CPU, CUDA, MPS = torch.device("cpu"), torch.device("cuda"), torch.device("mps")


def pretend(monkeypatch: pytest.MonkeyPatch, *, cuda: bool = False, mps: bool = False, bf16: bool = True) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    # A GPU without bfloat16 hardware claims support if emulation counts.
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: bf16 or including_emulation)


@pytest.mark.parametrize(
    ("cuda", "mps", "expected"),
    [(True, True, "cuda"), (True, False, "cuda"), (False, True, "mps"), (False, False, "cpu")],
)
def test_auto_takes_the_fastest_that_is_there(
    cuda: bool, mps: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, cuda=cuda, mps=mps)
    assert resolve_device("auto") == torch.device(expected)
    assert resolve_device(expected) == torch.device(expected)
    assert resolve_device("cpu") == CPU


@pytest.mark.parametrize("name", ["cuda", "mps"])
def test_a_missing_device_is_an_error_that_names_what_is_there(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, cuda=name != "cuda", mps=name != "mps")
    other = "mps" if name == "cuda" else "cuda"
    with pytest.raises(UserError, match=rf"'{name}' is not there; this machine has {other}, cpu") as caught:
        resolve_device(name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["gpu", "CPU", "", "cuda:99"])
def test_an_unknown_device_is_an_error_that_lists_the_names(name: str) -> None:
    with pytest.raises(UserError, match="use auto, cpu, cuda or mps"):
        resolve_device(name)


@pytest.mark.parametrize(
    ("device", "bf16", "expected"),
    [
        (CPU, True, torch.float32),
        (CUDA, True, torch.bfloat16),
        (CUDA, False, torch.float16),
        (MPS, True, torch.float16),
    ],
)
def test_auto_dtype_follows_the_device(
    device: torch.device, bf16: bool, expected: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, bf16=bf16)
    assert resolve_dtype("auto", device) == expected


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("device", [CPU, CUDA, MPS])
def test_a_named_dtype_is_taken_as_it_is(name: str, device: torch.device) -> None:
    dtype = resolve_dtype(name, device)
    assert dtype == getattr(torch, name)
    assert dtype_name(dtype) == name


def test_an_unknown_dtype_is_an_error_that_lists_the_names() -> None:
    with pytest.raises(UserError, match="'fp16'; use auto, float32, bfloat16, float16"):
        resolve_dtype("fp16", CPU)


def test_resident_memory_follows_an_allocation() -> None:
    before = memory(CPU)
    # Mapped, not allocated: the allocator may return pages that an earlier test has touched.
    block = mmap.mmap(-1, 64 * 2**20)
    for page in range(0, len(block), mmap.PAGESIZE):
        block[page] = 1
    during = memory(CPU)
    assert during["rss"] - before["rss"] == pytest.approx(64, abs=16)
    assert during["peak_rss"] >= during["rss"]
    block.close()


def test_a_reset_starts_the_peak_anew_or_says_that_it_cannot() -> None:
    block = torch.ones(64 * 2**20 // 4)
    del block
    before = memory(CPU)
    started_anew = reset_peak(CPU)
    after = memory(CPU)["peak_rss"]
    if started_anew:
        assert after < before["rss"] + 16
    else:
        assert after >= before["peak_rss"]


def test_without_proc_the_peak_comes_from_getrusage(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_file(self: Path, *_: object, **__: object) -> str:
        raise FileNotFoundError(self)

    monkeypatch.setattr(Path, "read_text", no_file)
    monkeypatch.setattr(Path, "write_text", no_file)
    unit = 2**20 if sys.platform == "darwin" else 2**10
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    assert memory(CPU)["peak_rss"] >= peak
    assert reset_peak(CPU) is False


@pytest.mark.skipif(module._linux_peak() is None, reason="this system keeps no second peak in /proc")
def test_a_peak_inherited_from_the_parent_process_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    inherited = resource.struct_rusage((0.0, 0.0, 2**40, *[0] * 13))
    monkeypatch.setattr(resource, "getrusage", lambda _: inherited)
    assert memory(CPU)["peak_rss"] < 2**30


def test_device_figures_appear_only_with_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 3 * 2**20)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 5 * 2**20)
    monkeypatch.setattr(torch.mps, "current_allocated_memory", lambda: 7 * 2**20)
    assert set(memory(CPU)) == {"rss", "peak_rss"}
    on_cuda, on_mps = memory(CUDA), memory(MPS)
    assert (on_cuda["cuda_allocated"], on_cuda["cuda_peak"], "mps_allocated" in on_cuda) == (3, 5, False)
    assert (on_mps["mps_allocated"], "cuda_peak" in on_mps) == (7, False)


def test_waiting_and_resetting_reach_the_device_in_question(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: calls.append(f"wait {device}"))
    monkeypatch.setattr(torch.mps, "synchronize", lambda: calls.append("wait mps"))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: calls.append(f"reset {device}"))
    for device in (CPU, torch.device("cuda:1"), MPS):
        synchronize(device)
        reset_peak(device)
    assert calls == ["wait cuda:1", "reset cuda:1", "wait mps"]


def test_threads_are_as_before_afterwards() -> None:
    before = torch.get_num_threads()
    for count in (0, before + 1, before + 2):
        with torch_threads(count):
            assert torch.get_num_threads() == (count or before)
        assert torch.get_num_threads() == before
        with pytest.raises(KeyboardInterrupt), torch_threads(count):
            raise KeyboardInterrupt
        assert torch.get_num_threads() == before


def test_every_step_has_a_context_of_its_own() -> None:
    """The caller's code runs outside, also where it leaves the loop early, and the steps are closed then."""
    entered: list[str] = []

    @contextmanager
    def context() -> Iterator[None]:
        entered.append("in")
        try:
            yield
        finally:
            entered.append("out")

    def steps(count: int) -> Iterator[int]:
        try:
            for number in range(count):
                entered.append(f"step {number}")
                yield number
        finally:
            entered.append("closed")

    for number in each_within(context, steps(2)):
        entered.append(f"got {number}")
    whole = ["in", "step 0", "out", "got 0", "in", "step 1", "out", "got 1", "in", "closed", "out"]
    assert entered == whole
    entered.clear()
    for _ in each_within(context, steps(9)):
        break
    assert entered == ["in", "step 0", "out", "closed"]


def test_an_error_of_a_step_passes_through_its_context() -> None:
    def steps() -> Iterator[int]:
        yield 1
        raise KeyError("broken")

    before, seen = torch.get_num_threads(), list[int]()
    with pytest.raises(KeyError, match="broken"):
        seen.extend(each_within(lambda: torch_threads(before + 1), steps()))
    assert torch.get_num_threads() == before
    assert seen == [1]

"""The recorded device on small steps: what a replay repeats, what it forgets, and what cannot be recorded.

Whole steps of models are in test_graphs.py.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

import phase6
from common.errors import UserError
from phase6.kernels.cuda import library
from phase6.recorded import CaptureError, RecordedDevice, recorded_device

HOST = torch.tensor([1, 1, 1, 1], dtype=torch.int32)
HEADERS = Path(phase6.__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def device() -> Iterator[RecordedDevice]:
    if importlib.util.find_spec("pybind11") is None:
        pytest.skip("pybind11 is not installed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPECDEC_CUDA_EMULATOR", str(HEADERS / "recorder" / "emulator.h"))
        if (reason := library.why_not(library.CPU)) is not None:
            pytest.skip(reason)
        yield recorded_device(library.library(library.CPU))


@pytest.fixture
def state(device: RecordedDevice) -> Tensor:
    """Return int32 [4] on the device: 1, 2, 3, 4."""
    made = device.empty(16).view(torch.int32)
    device.copy_in(made, torch.tensor([1, 2, 3, 4], dtype=torch.int32))
    return made


def test_a_replay_repeats_a_step_and_a_capture_executes_nothing(device: RecordedDevice, state: Tensor) -> None:
    def step() -> Tensor:
        state.add_(state.flip(0).clamp(max=2))
        return torch.cat((state, state[1:3] * 2))

    assert device.copy_out(device.run(step))() == [3, 4, 5, 5, 8, 10]
    graph = device.capture(step)  # two runs, and a capture
    assert device.copy_out(state)() == [7, 8, 9, 9]
    for n in (1, 2):
        before, reads = device.used, device.reads
        assert device.copy_out(graph.replay())()[0] == 7 + 2 * n
        assert (device.used, device.reads) == (before, reads + 1)


def test_memory_of_a_graph_is_forgotten(device: RecordedDevice, state: Tensor) -> None:
    kept: list[Tensor] = []

    def step() -> Tensor:
        if not kept:
            kept.append(state + 1)
        floats, numbers = torch.empty(2), torch.empty(2, dtype=torch.int32)
        return torch.cat((floats.isnan().int(), (numbers == -1515870811).int(), kept[0][:1]))  # 0xA5A5A5A5

    graph = device.capture(step)
    assert device.copy_out(graph.replay())() == [1, 1, 1, 1, 2]  # what the first run made is not the graph's


def test_arguments_are_compared_in_the_same_memory(device: RecordedDevice, state: Tensor) -> None:
    number = [5]
    steps: dict[str, Callable[[], Tensor]] = {"state": lambda: state + state[:1], "value": lambda: state + number[0]}
    for name, step in steps.items():
        first = device.capture(step)
        number[0] += 1
        device.copy_in(state, torch.tensor([9, 9, 9, 9], dtype=torch.int32))
        second = device.capture(step, like=first)
        assert (first.recording.arguments == second.recording.arguments) == (name == "state")


@pytest.mark.parametrize(
    ("what", "said"),
    [
        (lambda device, state: state.sum().item(), "the host reads device memory: aten.item"),
        (lambda device, state: bool(state[0] > 0), "the host reads device memory: aten.is_nonzero"),
        (lambda device, state: state[state > 1], "the shape of a result depends on device memory: aten.index"),
        (lambda device, state: torch.tensor([1]), "a copy from the host within a step: aten.lift_fresh"),
        (lambda device, state: state + HOST, "an operation on host memory within a step: aten.add"),
        (lambda device, state: device.empty(4), "an allocation of device memory while a step was recorded"),
        (lambda device, state: device.copy_out(state), "a copy to the host while a step was recorded"),
        (lambda device, state: device.copy_in(state, state), "a copy from the host while a step was recorded"),
    ],
)
def test_what_cannot_be_recorded(
    what: Callable[[RecordedDevice, Tensor], object], said: str, device: RecordedDevice, state: Tensor
) -> None:
    def step() -> Tensor:
        what(device, state)
        return state

    with pytest.raises(CaptureError, match=said):
        device.capture(step)
    assert device.recording is None
    assert state.tolist() == [1, 2, 3, 4]  # the arena is open again


def test_an_allocation_that_grows_is_noticed(device: RecordedDevice, state: Tensor) -> None:
    size = [64]

    def step() -> Tensor:
        size[0] *= 2
        return torch.zeros(size[0])

    with pytest.raises(CaptureError, match="an allocation of 2048 bytes, more than the same step took before"):
        device.capture(step)


def test_another_emulator_is_refused(device: RecordedDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    class Library:
        __file__ = str(Path(importlib.util.find_spec("_ctypes").origin))  # type: ignore[union-attr,arg-type]

    with pytest.raises(UserError, match="this emulator of CUDA records no graphs"):
        RecordedDevice(Library)  # type: ignore[arg-type]

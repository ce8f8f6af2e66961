"""The profile's files have one schema; its ranges fill a step; a GPU's events are read after the run only."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch

import phase6
from phase6 import clocks, profiler
from phase6.kernels import registry
from phase6.profiler import RANGES, Profiler

CPU = torch.device("cpu")
NUMBER = {"type": "number", "minimum": 0}
EACH = {name: NUMBER for name in RANGES}
STEPS = {
    "type": "object",
    "additionalProperties": False,
    "required": ["schema_version", "clock", "wall_ms", "ranges_ms", "coverage", "around_ms", "steps"],
    "properties": {
        "schema_version": {"const": 1},
        "clock": {"enum": ["host", "events"]},
        "wall_ms": NUMBER,
        "ranges_ms": {"type": "object", "required": list(RANGES), "properties": EACH, "additionalProperties": False},
        "coverage": {"type": "number", "minimum": 0.95, "maximum": 1.001},
        "around_ms": {"type": "object", "additionalProperties": NUMBER},
        "steps": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["step", "traced", "ms", "sequences"],
                "properties": {"step": {"type": "integer"}, "traced": {"type": "boolean"}, "ms": NUMBER, **EACH},
            },
        },
    },
}


WHY_NOT_CPP = registry.why_not("cpp", CPU)
PROMPT = "import os\n" * 20


@pytest.mark.parametrize(
    "name", ["torch", pytest.param("cpp", marks=pytest.mark.skipif(WHY_NOT_CPP is not None, reason=str(WHY_NOT_CPP)))]
)
@pytest.mark.parametrize("k", [0, 3])
def test_the_files_have_one_schema_and_ranges_leave_no_gap(
    name: str, k: int, tmp_path: Path, make_checkpoint: Callable[..., Path]
) -> None:
    folder = str(make_checkpoint("llama"))
    options: dict[str, Any] = {"model": folder, "device": "cpu", "kernels": name, "dtype": "float32", "max_tokens": 12}
    options |= {"draft": folder, "k": k} if k else {"draft": "none"}
    with Profiler(tmp_path, CPU, traced=0) as made:
        llm = phase6.LLM(phase6.Options(**options))
        for _ in made.watch(llm.run(llm.sequences([PROMPT, "class A:"]))):
            pass
    assert made.run is not None
    document = json.loads((made.run / "steps.json").read_text())
    jsonschema.validate(document, STEPS)
    assert document["clock"] == "host"
    assert document["ranges_ms"]["prefill"] > 0
    assert (document["ranges_ms"]["draft"] > 0) == bool(k)
    assert sum(document["ranges_ms"].values()) == pytest.approx(document["coverage"] * document["wall_ms"])
    memory = json.loads((made.run / "memory.json").read_text())
    assert set(memory) == {"schema_version", "unit", "samples", "cuda_bytes"}


class Events:
    """Moments whose distance is known once the device has done its work, as that of CUDA events."""

    name = "events"

    def __init__(self) -> None:
        self.count, self.settled = 0, False

    def now(self) -> int:
        assert not self.settled
        self.count += 1
        return self.count

    def settle(self) -> None:
        self.settled = True

    def ms(self, began: int, ended: int) -> float:
        assert self.settled, "an event was read within the run"
        return float(ended - began)


def test_events_are_read_after_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events = Events()
    monkeypatch.setattr(profiler, "clock_of", lambda device: events)
    with Profiler(tmp_path, CPU, traced=0) as made:
        llm = phase6.LLM(phase6.Options(model="fake", draft="fake:0.7", device="cpu", max_tokens=12))
        for _ in made.watch(llm.run(llm.sequences(["a b c"]))):
            pass
    assert made.run is not None
    document = json.loads((made.run / "steps.json").read_text())
    assert document["clock"] == "events"
    assert all(step["ms"] >= step["verify"] == 1.0 for step in document["steps"])


def test_the_clock_follows_from_the_device() -> None:
    assert isinstance(clocks.clock_of(CPU), clocks.HostClock)
    assert isinstance(clocks.clock_of(torch.device("cuda")), clocks.EventClock)

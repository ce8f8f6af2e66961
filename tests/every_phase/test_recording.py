"""`--record`: the same schema in every phase that has it, the same tokens, and no added operation in the loop."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import pytest
from torch.utils._python_dispatch import TorchDispatchMode

from common.phases import Phase, phases
from common.recording import Recording

WAYS: dict[str, tuple[int, dict[str, Any]]] = {  # with the first phase
    "plain": (2, {"draft": "none"}),
    "model": (2, {"draft": "fake:0.7"}),
    "ngram": (3, {"drafter": "ngram"}),
    "coupled": (3, {"draft": "fake:0.7", "policy": "coupled"}),
    "typical": (3, {"draft": "fake:0.7", "policy": "typical"}),
    "static tree": (3, {"draft": "fake:0.7", "tree": "static"}),
    "dynamic tree": (3, {"draft": "fake:0.7", "tree": "dynamic"}),
}


@pytest.fixture(params=phases()[1:], ids=lambda phase: phase.package)
def later(request: pytest.FixtureRequest) -> Phase:
    found: Phase = request.param
    return found


@pytest.fixture(params=list(WAYS))
def options(request: pytest.FixtureRequest, later: Phase) -> dict[str, Any]:
    since, chosen = WAYS[request.param]
    if later.number < since:
        pytest.skip(f"comes with phase {since}")
    return {"model": "fake", "max_tokens": 10, "temperature": 1.0, **chosen}


class Operations(TorchDispatchMode):
    """Records every operation of torch, by name."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def how_to_run(engine: ModuleType, recorder: Any) -> list[Any]:
    """Phase 2 shows its plain steps to a function; from phase 5 on a call may make several steps, without logits."""
    if hasattr(engine, "make_runner"):
        return [recorder is None]
    return [] if hasattr(engine, "TargetOutput") or recorder is None else [recorder.watch]


def run(engine: ModuleType, options: dict[str, Any], record: Path | None) -> tuple[list[list[int]], list[str]]:
    """Return the tokens of two prompts, and the operations of the loop without the recorder's."""
    llm = engine.LLM(engine.Options(**options))
    sequences = llm.sequences(["x y z x y", "a longer text"])
    recorder = importlib.import_module(f"{engine.__name__}.record").Recorder(record, llm, sequences) if record else None
    steps = llm.run(sequences, *how_to_run(engine, recorder))
    names, ended, going = list[str](), cast(Any, object()), True
    while going:
        with Operations() as counted:
            step = next(steps, ended)
        names += counted.names
        going = step is not ended
        if going and recorder:
            recorder.step(step)
    if recorder:
        recorder.finish()
    return [sequence.tokens for sequence in sequences], names


@pytest.mark.newest(2)
def test_recording_changes_no_token_and_adds_no_operation_to_the_loop(
    later: Phase, options: dict[str, Any], tmp_path: Path, check_recording: Callable[[Path], Recording]
) -> None:
    """Recording reads only what the loop has computed already, after each step."""
    engine = importlib.import_module(later.package)
    tokens, names = run(engine, options, None)
    recorded, with_record = run(engine, options, tmp_path / "run.jsonl")
    assert recorded == tokens
    assert with_record == names
    assert len(names) > 50
    recording = check_recording(tmp_path / "run.jsonl")
    assert recording.header["phase"] == later.number
    assert [recording.tokens(number) for number in (0, 1)] == tokens
    assert recording.footer is not None
    assert recording.footer["finished"]

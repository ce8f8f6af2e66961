"""The profiler: its files, ranges without gaps, and no cost without --profile."""

from __future__ import annotations

import json
import mmap
import os
import time
import timeit
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import phase4
from common.errors import UserError
from common.options import run_main
from phase4 import memory_timeline, profiler
from phase4.cli import main
from phase4.memory_timeline import MemoryTimeline
from phase4.profiler import CURRENT, RANGES, Profiler, stage
from phase4.trace import Operator, read_trace

CPU = torch.device("cpu")
FAKE = ["--model", "fake", "--prompt", "x y z x y", "--max-tokens", "24"]
TRIES = 5  # of a few milliseconds each: a busy machine may interrupt one of them at a wrong moment
WRITTEN = {"memory.json", "operators.csv", "operators.txt", "steps.json", "trace.json"}


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as end:
        run_main(main, [*FAKE, *map(str, arguments)])
    out, err = capsys.readouterr()
    return int(end.value.code or 0), out, err


def steps_of(folder: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((folder / "steps.json").read_text())
    return document


def decode(profiler: Profiler, draft: str = "none", max_tokens: int = 40) -> list[int]:
    """Decode with the toy model, whose steps are very short."""
    llm = phase4.LLM(phase4.Options(model="fake", draft=draft, max_tokens=max_tokens, device="cpu"))
    sequences = llm.sequences(["a b c"])
    for _ in profiler.watch(llm.run(sequences)):
        pass
    return sequences[0].tokens


@pytest.mark.parametrize(
    ("arguments", "ranges"),
    [
        (["--draft", "none"], {"verify", "sample"}),
        pytest.param(["--draft", "fake:0.7"], {"draft", "verify", "accept"}, marks=pytest.mark.slow),
        (["--draft", "fake:0.7", "--tree", "static", "--temperature", 1], {"draft", "verify", "accept"}),
    ],
)
def test_a_run_is_written_and_its_ranges_leave_no_gap(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, arguments: list[object], ranges: set[str]
) -> None:
    for number in range(1, 1 + TRIES):
        status, out, err = run(capsys, *arguments, "--profile", tmp_path, "--profile-steps", 3, "--json")
        assert status == 0
        folder = tmp_path / f"run-{number}"
        assert str(folder) in err
        assert {file.name for file in folder.iterdir()} == WRITTEN
        document = steps_of(folder)
        if document["coverage"] >= 0.9:  # of very short steps
            break
    assert document["coverage"] >= 0.9
    assert ranges <= {name for name, ms in document["ranges_ms"].items() if ms > 0}
    assert sum(document["ranges_ms"][name] for name in RANGES) >= 0.9 * document["wall_ms"]
    steps = document["steps"]
    assert [step["step"] for step in steps if step["traced"]] == [1, 2, 3]
    (completion,) = json.loads(out)["completions"]
    assert len(steps) == completion["stats"]["steps"]
    for counted in ("proposed", "accepted"):
        assert sum(row[counted] for step in steps for row in step["sequences"]) == completion["stats"][counted]

    assert read_trace(folder / "trace.json").steps == 3
    table = (folder / "operators.csv").read_text().splitlines()
    assert table[0] == "range,operator,calls,cpu_ms,device_ms"
    assert any(line.startswith("verify,aten::") for line in table)
    assert "aten::" in (folder / "operators.txt").read_text()


def test_the_trace_and_the_clock_agree(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    tries = []
    for number in range(1, 1 + TRIES):
        status, _, _ = run(capsys, "--draft", "fake:0.7", "--profile", tmp_path, "--profile-steps", 3)
        assert status == 0
        folder = tmp_path / f"run-{number}"
        steps, trace = steps_of(folder)["steps"], read_trace(folder / "trace.json")
        ranges = ("draft", "verify", "accept")
        clocked = [sum(step[name] for step in steps if step["traced"]) for name in ranges]
        traced = [trace.ranges[name] for name in ranges]
        tries.append((clocked, traced, trace.wall_ms))
        # Beginning a range takes time too, as may other processes.
        if traced == pytest.approx(clocked, rel=0.3, abs=0.3) and sum(traced) >= 0.75 * trace.wall_ms:
            return
    pytest.fail(f"clocked, traced, wall: {tries}")


def test_the_steps_are_the_wall_time_of_decoding(tmp_path: Path) -> None:
    """A clock outside agrees: a range missing from the steps would show here."""
    llm, shares = phase4.LLM(phase4.Options(model="fake", draft="none", max_tokens=40, device="cpu")), list[float]()
    for _ in range(TRIES):
        with Profiler(tmp_path, CPU, traced=0) as profile:
            sequences = llm.sequences(["a b c"])
            began = time.perf_counter()
            for _ in profile.watch(llm.run(sequences)):
                pass
            wall = (time.perf_counter() - began) * 1e3
        assert {"load", "tokenize", "output"} <= set(profile.around)
        shares.append(sum(map(profile.total, RANGES)) / wall)
        if shares[-1] >= 0.9:
            return
    pytest.fail(f"shares of the wall time: {shares}")


def test_what_the_caller_does_between_steps_is_not_decoding(tmp_path: Path) -> None:
    def loop() -> Iterator[None]:
        for _ in range(3):
            stage("verify")
            time.sleep(0.02)
            stage("sample")
            yield

    with Profiler(tmp_path, CPU, traced=0) as profile:
        for _ in profile.watch(loop()):
            time.sleep(0.3)
    assert profile.total("verify") >= 60
    assert profile.around["output"] >= 900
    assert profile.total("ms") < 900 + profile.total("verify")
    assert profile.total("sample") < 300


def test_the_text_is_the_same_and_json_stays_one_document(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    _, plain, _ = run(capsys)
    _, profiled, err = run(capsys, "--profile", tmp_path)
    assert profiled == plain
    assert [line.partition(":")[0] for line in err.splitlines()[1:]] == ["profile"]


def test_nothing_is_overwritten(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    run(capsys, "--profile", tmp_path, "--max-tokens", 4)
    first = {file: file.read_bytes() for file in (tmp_path / "run-1").iterdir()}
    run(capsys, "--profile", tmp_path, "--max-tokens", 6)
    assert {file: file.read_bytes() for file in (tmp_path / "run-1").iterdir()} == first
    assert len(steps_of(tmp_path / "run-2")["steps"]) == 6


def test_switched_off_it_costs_less_than_a_hundredth_of_the_shortest_step(tmp_path: Path) -> None:
    """Less than a hundredth of 1 ms: no step of the toy model, or of an embedded model on a GPU, is shorter."""
    with Profiler(tmp_path, CPU, traced=0) as profile:
        decode(profile, "fake:0.7")
    calls = profile.entered / len(profile.steps)  # including the profiler's own
    assert calls >= 3
    assert CURRENT.get() is None
    times = timeit.repeat(lambda: stage("verify"), timer=time.thread_time, number=20_000, repeat=5)
    assert calls * min(times) / 20_000 < 0.01 * 1e-3


@pytest.mark.parametrize("error", [UserError("wrong"), KeyboardInterrupt()])
def test_a_block_that_fails_writes_nothing_and_leaves_nothing_running(tmp_path: Path, error: BaseException) -> None:
    profile = Profiler(tmp_path, CPU)

    def fail() -> None:
        with profile:
            decode(profile, max_tokens=4)
            raise error

    with pytest.raises(type(error)):
        fail()
    assert list(tmp_path.iterdir()) == []
    assert CURRENT.get() is None
    assert not profile.memory.is_alive()
    with torch.profiler.profile():  # refused while another trace runs
        pass


def test_an_interrupted_run_keeps_its_steps(tmp_path: Path) -> None:
    def loop() -> Iterator[None]:
        for number in range(5):
            stage("verify")
            if number == 3:
                raise KeyboardInterrupt
            yield

    with Profiler(tmp_path, CPU, traced=8) as profile, pytest.raises(KeyboardInterrupt):
        for _ in profile.watch(loop()):
            pass
    assert len(steps_of(tmp_path / "run-1")["steps"]) == 3
    assert (tmp_path / "run-1" / "trace.json").is_file()


def test_a_run_of_one_step_has_no_trace_and_says_so(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    status, _, err = run(capsys, "--profile", tmp_path, "--max-tokens", 1)
    assert status == 0
    assert "no trace" in err
    assert {file.name for file in (tmp_path / "run-1").iterdir()} == {"steps.json", "memory.json"}


def test_large_traces_are_warned_of(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert profiler.LARGE == 50 * 2**20
    assert "warning" not in run(capsys, "--profile", tmp_path)[2]
    monkeypatch.setattr(profiler, "LARGE", 2**14)
    warning = run(capsys, "--profile", tmp_path)[2].splitlines()[-1]
    for word in ("warning", "MiB", "--profile-steps", "--profile-stacks"):
        assert word in warning


def test_stacks_are_in_the_trace_where_they_were_asked_for(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    short = ["--profile", tmp_path, "--profile-steps", 1, "--max-tokens", 3]
    run(capsys, *short)
    run(capsys, *short, "--profile-stacks")
    without, with_stacks = (tmp_path / f"run-{number}" / "trace.json" for number in (1, 2))
    assert '"python_function"' not in without.read_text()
    assert "next_logits" in with_stacks.read_text()
    assert read_trace(with_stacks).ranges.keys() >= {"verify", "sample"}


@pytest.mark.parametrize("unwritable", ["file/below", "file", "closed/below"])
def test_an_unwritable_folder_is_refused_before_the_run(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, unwritable: str
) -> None:
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "closed").mkdir(mode=0o500)
    if unwritable.startswith("closed") and os.access(tmp_path / "closed", os.W_OK):
        pytest.skip("this user may write everywhere")
    status, out, err = run(capsys, "--model", "missing-model", "--profile", tmp_path / unwritable)
    assert status == 2
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith(f"error: --profile {tmp_path / unwritable}: cannot be written")
    assert (tmp_path / "file").read_text() == "in the way"


@pytest.mark.parametrize(("value", "folder"), [("1", "profile"), ("0", None), ("", None), ("mine", "mine")])
def test_the_environment_switches_it_on_and_off(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    value: str,
    folder: str | None,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SPECDEC_PROFILE", value)
    assert run(capsys, "--max-tokens", 2)[0] == 0
    assert [path.name for path in tmp_path.iterdir()] == ([folder] if folder else [])
    monkeypatch.setenv("SPECDEC_PROFILE", "1")
    assert run(capsys, "--max-tokens", 2, "--profile", "0")[0] == 0
    assert (tmp_path / "profile").exists() == (folder == "profile")


def test_beams_have_no_steps_to_profile(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    status, _, err = run(capsys, "--beams", 2, "--profile", tmp_path / "p")
    assert status == 2
    assert "--beams" in err
    assert "--profile" in err


def wait_for_samples(timeline: MemoryTimeline, count: int) -> None:
    end = time.monotonic() + 60
    while len(timeline.samples) < count:
        assert time.monotonic() < end
        time.sleep(0.001)


def test_memory_is_seen_to_rise(tmp_path: Path) -> None:
    timeline = MemoryTimeline(CPU, lambda: "load", pause=0.002)
    timeline.start()
    wait_for_samples(timeline, 1)
    # new pages: torch may reuse memory freed by an earlier test
    taken = mmap.mmap(-1, 64 * 2**20)
    taken.write(b"1" * len(taken))
    wait_for_samples(timeline, len(timeline.samples) + 2)  # the first may have begun before
    timeline.end()
    taken.close()
    sizes = [sample["rss"] for sample in timeline.samples]
    assert max(sizes) - sizes[0] > 50
    assert [sample["ms"] for sample in timeline.samples] == sorted(sample["ms"] for sample in timeline.samples)
    assert {sample["range"] for sample in timeline.samples} == {"load"}


def test_a_long_timeline_is_thinned_and_keeps_its_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_timeline, "KEPT", 8)
    timeline = MemoryTimeline(CPU, lambda: "", pause=0.0005)
    timeline.start()
    wait_for_samples(timeline, 1)
    (first,) = timeline.samples[:1]
    end = time.monotonic() + 60
    while timeline.pause < 4 * 0.0005:  # thinned twice
        assert time.monotonic() < end
        time.sleep(0.001)
    last = (time.perf_counter() - timeline._began) * 1e3
    timeline.end()
    assert len(timeline.samples) <= 8
    assert timeline.samples[0] == first
    assert timeline.samples[-1]["ms"] >= last


def event(cat: str, name: str, ts: float, dur: float, tid: int = 1, id_: int | None = None) -> dict[str, Any]:
    return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "tid": tid, "args": {"External id": id_}}


def test_a_trace_is_summed_up(tmp_path: Path) -> None:
    """By hand: an operator's time excludes the operators it calls, and time outside the steps is not counted."""
    events = [
        event("user_annotation", "step 1", 0, 1000),
        event("user_annotation", "verify", 10, 700),
        event("cpu_op", "aten::linear", 20, 300, id_=1),
        event("cpu_op", "aten::mm", 50, 200, id_=2),
        event("cpu_op", "aten::mm", 400, 100, id_=3),
        event("user_annotation", "torch's own", 500, 150),
        event("cpu_op", "aten::_softmax", 510, 40),
        event("user_annotation", "sample", 710, 280),
        event("cpu_op", "aten::argmax", 720, 80),
        event("cpu_op", "aten::add", 1200, 50, id_=9),
        event("user_annotation", "output", 1100, 300),
        event("gpu_user_annotation", "verify", 10, 700, tid=7),
        event("cpu_op", "aten::mm", 100, 500, tid=2),
    ]
    file = tmp_path / "trace.json"
    file.write_text(json.dumps({"traceEvents": events}))
    trace = read_trace(file)
    assert (trace.steps, trace.wall_ms, trace.ranges) == (1, 1.0, {"verify": 0.7, "sample": 0.28})
    verify = trace.operators["verify"]
    assert verify["aten::linear"].cpu_ms == pytest.approx(0.1)
    assert verify["aten::mm"].calls == 2
    assert verify["aten::mm"].cpu_ms == pytest.approx(0.3)
    assert trace.operators["sample"] == {"aten::argmax": Operator(1, 0.08)}
    assert not trace.on_device
    families = {"matrix products": 0.4, "attention": 0.04, "elementwise": 0.0, "overhead": 0.26}
    assert trace.families("verify") == pytest.approx(families)

    kernels = [event("kernel", "gemm", 60, 500, tid=7, id_=2), event("kernel", "gemm", 600, 20, tid=7, id_=3)]
    kernels += [event("kernel", "elsewhere", 1300, 500, tid=7, id_=9), event("kernel", "unknown", 0, 9, tid=7)]
    file.write_text(json.dumps({"traceEvents": events + kernels}))
    trace = read_trace(file)
    assert trace.on_device
    assert trace.operators["verify"]["aten::mm"].device_ms == pytest.approx(0.52)
    families = {"matrix products": 0.52, "attention": 0.0, "elementwise": 0.0, "overhead": 0.18}
    assert trace.families("verify") == pytest.approx(families)


def test_what_is_no_trace_is_refused(tmp_path: Path) -> None:
    (tmp_path / "steps.json").write_text('{"steps": []}')
    with pytest.raises(UserError, match="not a Chrome trace"):
        read_trace(tmp_path / "steps.json")
    with pytest.raises(UserError, match="cannot be read"):
        read_trace(tmp_path / "missing.json")

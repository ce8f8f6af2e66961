"""Profiling a run: a trace of a few steps, operators, memory over time, and the ranges of every step.

A decoding loop calls `stage("verify")`, and the time until the next call belongs to that range, so the ranges of a step
leave no gap. Without a profiler a call only looks up one context variable; torch's `record_function` would cost some
microseconds even then.

    python generate.py --prompt "from pathlib import" --profile profile

writes the folder profile/run-1, the next run profile/run-2: trace.json (for https://ui.perfetto.dev), operators.txt,
operators.csv, memory.json and steps.json.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from contextvars import ContextVar
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from common.device import MIB
from common.errors import UserError

from .clocks import clock_of
from .memory_timeline import MemoryTimeline
from .trace import STEP, read_trace

T = TypeVar("T")
RANGES = ("schedule", "prefill", "draft", "verify", "accept", "sample")  # of a decoding step
SCHEMA = 1  # version of the files
WARM_UP = 1  # steps before the trace begins
LARGE = 50 * MIB  # a trace file that a browser opens slowly
CURRENT: ContextVar[Profiler | None] = ContextVar("profiler", default=None)


def stage(name: str) -> None:
    """Begin the range `name`, which lasts to the next call. Does nothing without a profiler."""
    profiler = CURRENT.get()
    if profiler is not None:
        profiler.enter(name)


class Profiler:
    """Profiles what runs inside its `with` block, and writes it at the end unless the block fails.

    Ranges are timed in all steps. After the first step `traced` steps are traced in full (0: none), with Python stacks
    if `stacks`. On a GPU ranges are timed by events, which are read at the end: no range makes the host wait.
    UserError, before anything runs, if the folder cannot be written.
    """

    def __init__(self, folder: Path, device: torch.device, traced: int = 8, stacks: bool = False) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):  # a read-only disk is not seen in permissions
                pass
        except OSError as error:
            raise UserError(
                f"--profile {folder}: cannot be written ({error.strerror or error}); name a folder that can be"
            ) from None
        self.folder, self.device, self.traced, self.stacks = folder, device, traced, stacks
        self.steps: list[dict[str, Any]] = []
        self.around: dict[str, float] = defaultdict(float)  # ms by range, outside the steps
        self.clock = clock_of(device)
        self._timed: list[tuple[dict[str, Any], str, Any, Any]] = []  # what is to be added where: a name, two moments
        self.run: Path | None = None  # the written folder
        self.memory = MemoryTimeline(device, lambda: self._range)
        self._range, self._since = "", self.clock.now()
        self._spent: dict[str, Any] = self.around
        self._trace: profile | None = None
        self._tracing = False
        self._annotation: record_function | None = None

    def __enter__(self) -> Self:
        if self.traced:
            with self._recorder(), record_function("warm-up"):  # the first takes a second, outside of all steps
                pass
        self._token = CURRENT.set(self)
        self.memory.start()
        self.enter("load")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.enter("")
        CURRENT.reset(self._token)
        self.clock.settle()
        for spent, name, began, ended in self._timed:
            spent[name] = spent.get(name, 0.0) + self.clock.ms(began, ended)
        self.memory.end()
        self._stop_trace()
        if error is None:
            self._write()

    def enter(self, name: str) -> None:
        """End the current range and begin another; "" begins none."""
        now = self.clock.now()
        if self._range:
            self._timed.append((self._spent, self._range, self._since, now))
        if self._annotation is not None:
            self._annotation.__exit__(None, None, None)
            self._annotation = None
        if self.device.type == "cuda":
            torch.cuda.nvtx.range_pop() if self._range else None
            torch.cuda.nvtx.range_push(name) if name else None
        self._range, self._since = name, now
        if self._tracing and name:
            self._annotation = record_function(name)
            self._annotation.__enter__()

    def watch(self, run: Iterable[T]) -> Iterator[T]:
        """Yield the steps of a decoding loop. The caller's time between them is the range `output`."""
        steps = iter(run)
        while True:
            self.enter("")
            number = len(self.steps)
            if self.traced and number == WARM_UP:
                self._start_trace()
            entry: dict[str, Any] = {"step": number, "traced": self._tracing}
            self._spent = entry
            try:
                with record_function(f"{STEP}{number}") if self._tracing else nullcontext():
                    began = self.clock.now()
                    try:  # the inner annotation ends before the outer, in an error too
                        self.enter("schedule")
                        step = next(steps)
                    finally:
                        self.enter("")
                        self._timed.append((entry, "ms", began, self.clock.now()))
            except StopIteration:
                return
            finally:
                self._spent = self.around
            entry["sequences"] = [dataclasses.asdict(stats) for stats in getattr(step, "stats", [])]
            self.steps.append(entry)
            if len(self.steps) == WARM_UP + self.traced:
                self._stop_trace()
            self.enter("output")
            yield step

    def total(self, name: str) -> float:
        """Return the milliseconds of a range over all steps; `ms` is the wall time."""
        return float(sum(step.get(name, 0.0) for step in self.steps))

    @property
    def coverage(self) -> float:
        """Return the share of the steps' time inside RANGES."""
        return sum(map(self.total, RANGES)) / self.total("ms") if self.steps else 0.0

    def _recorder(self) -> profile:
        os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # otherwise it writes to stderr
        device = [ProfilerActivity.CUDA] if self.device.type == "cuda" else []
        return profile(activities=[ProfilerActivity.CPU, *device], with_stack=self.stacks)

    def _start_trace(self) -> None:
        if self._trace is None:
            self._trace = self._recorder()
            self._trace.start()
            self._tracing = True

    def _stop_trace(self) -> None:
        if self._trace is not None and self._tracing:
            self._tracing = False
            self._trace.stop()

    def _write(self) -> None:
        try:
            self.run = _next_run(self.folder)
            totals = {name: self.total(name) for name in RANGES}
            summary = {"clock": self.clock.name, "wall_ms": self.total("ms"), "ranges_ms": totals}
            cuda = torch.cuda.memory_stats(self.device) if self.device.type == "cuda" else {}
            allocator = {name: value for name, value in cuda.items() if name.endswith(("all.peak", "retries", "ooms"))}
            documents: dict[str, dict[str, Any]] = {
                "steps": {**summary, "coverage": self.coverage, "around_ms": self.around, "steps": self.steps},
                "memory": {"unit": "MiB", "samples": self.memory.samples, "cuda_bytes": allocator},
            }
            for file, content in documents.items():
                text = json.dumps({"schema_version": SCHEMA, **content}) + "\n"
                (self.run / f"{file}.json").write_text(text, encoding="utf-8")
            if self._trace is not None and len(self.steps) > WARM_UP:
                self._trace.export_chrome_trace(str(self.run / "trace.json"))
                order = "self_device_time_total" if self.device.type == "cuda" else "self_cpu_time_total"
                table = self._trace.key_averages().table(sort_by=order, row_limit=40, max_name_column_width=50)
                (self.run / "operators.txt").write_text(table, encoding="utf-8")
                self._write_operators(self.run)
        except OSError as error:
            raise UserError(f"--profile {self.folder}: cannot be written ({error.strerror or error})") from None

    def _write_operators(self, run: Path) -> None:
        """Write operators by range, which torch's table does not do."""
        with (run / "operators.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["range", "operator", "calls", "cpu_ms", "device_ms"])
            for range_, operators in read_trace(run / "trace.json").operators.items():
                for name, operator in sorted(operators.items(), key=lambda item: -item[1].cpu_ms):
                    writer.writerow([range_, name, operator.calls, operator.cpu_ms, operator.device_ms])

    def report(self) -> str:
        """Describe the run for people: its folder, the shares of the ranges, and warnings."""
        assert self.run is not None, "the block has not ended yet"
        shares = ", ".join(f"{name} {self.total(name) / self.total('ms'):.0%}" for name in RANGES if self.total(name))
        lines = [f"profile: {self.run}; where the time of {len(self.steps)} decoding steps went: {shares}"]
        trace = self.run / "trace.json"
        if not trace.is_file():
            lines.append("note: no trace was written: the first step is the warm-up, and the run had no other")
        elif (size := trace.stat().st_size) > LARGE:
            lines.append(f"warning: {trace} has {size / MIB:.0f} MiB: fewer --profile-steps, or no --profile-stacks")
        return "\n".join(lines)


def _next_run(folder: Path) -> Path:
    """Make the next folder of run-1, run-2, ...; no run overwrites another."""
    for number in count(1):
        run = folder / f"run-{number}"
        try:
            run.mkdir()
        except FileExistsError:
            continue
        return run
    raise AssertionError("numbers do not end")

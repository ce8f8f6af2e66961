"""Reads a Chrome trace: the time of each named range, and of the operators in it.

trace = read_trace(Path("profile/run-1/trace.json"))
print(trace.ranges, trace.families("verify"))
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.files import read_json

STEP = "step "  # a decoding step is annotated with this and its number
ATTENTION = ("attention", "softmax", "bmm")  # parts of operator names; a matmul above two dimensions is a bmm
MATRIX = ("mm", "linear", "matmul")
ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")


@dataclass
class Operator:
    """Calls and milliseconds of one operator in one range, without the time of the operators that it calls."""

    calls: int = 0
    cpu_ms: float = 0.0
    device_ms: float = 0.0  # of the kernels it launched


@dataclass(frozen=True)
class Trace:
    """Sums over the traced steps, in milliseconds."""

    steps: int
    wall_ms: float
    ranges: dict[str, float]
    operators: dict[str, dict[str, Operator]]  # by range

    @property
    def on_device(self) -> bool:
        """True if kernels on a device were traced; their times count then, not those of the launching operators."""
        return any(each.device_ms for of_range in self.operators.values() for each in of_range.values())

    def families(self, name: str) -> dict[str, float]:
        """Split the milliseconds of one range by family; `overhead` is the time outside operators (device: kernels).

        Overhead is Python, the dispatcher, and the tracing itself, some microseconds per operator.
        """
        found = {"matrix products": 0.0, "attention": 0.0, "elementwise": 0.0}
        for operator, each in self.operators.get(name, {}).items():
            found[family(operator)] += each.device_ms if self.on_device else each.cpu_ms
        return found | {"overhead": max(0.0, self.ranges.get(name, 0.0) - sum(found.values()))}


def family(operator: str) -> str:
    """Return an operator's family. `elementwise` is everything but matrix products and attention: norms, copies, ..."""
    if any(part in operator for part in ATTENTION):
        return "attention"
    return "matrix products" if any(part in operator for part in MATRIX) else "elementwise"


def read_trace(path: Path) -> Trace:
    """Read the trace of a profiler's run. UserError if the file is not a trace."""
    events = read_json(path).get("traceEvents")
    if not isinstance(events, list):
        raise UserError(f"{path}: not a Chrome trace: it has no list `traceEvents`")
    spans = [event for event in events if event.get("ph") == "X"]
    annotations = [event for event in spans if event.get("cat") == "user_annotation"]
    steps = [event for event in annotations if event["name"].startswith(STEP)]
    threads = {event["tid"] for event in steps}
    ranges: dict[str, float] = defaultdict(float)
    operators: dict[str, dict[str, Operator]] = defaultdict(lambda: defaultdict(Operator))
    launched_by: dict[Any, Operator] = {}
    for thread in threads:
        mine = [e for e in spans if e["tid"] == thread and e.get("cat") in ("user_annotation", "cpu_op")]
        mine.sort(key=lambda event: (event["ts"], -event["dur"]))
        stack: list[tuple[float, str, Operator | None]] = []  # open events: end, range, operator
        for event in mine:
            while stack and event["ts"] >= stack[-1][0]:
                stack.pop()
            end, ms = event["ts"] + event["dur"], event["dur"] / 1e3
            if event["cat"] == "user_annotation":
                if event["name"].startswith(STEP):
                    stack.append((end, "", None))
                elif stack and stack[-1][1:] == ("", None):  # directly inside a step; torch adds inner annotations
                    ranges[event["name"]] += ms
                    stack.append((end, event["name"], None))
                continue
            if not stack:  # outside of all steps
                continue
            _, range_, caller = stack[-1]
            operator = operators[range_][event["name"]]
            operator.calls += 1
            operator.cpu_ms += ms
            if caller is not None:
                caller.cpu_ms -= ms
            stack.append((end, range_, operator))
            launched_by[event.get("args", {}).get("External id")] = operator
    launched_by.pop(None, None)
    for event in spans:
        launcher = launched_by.get(event.get("args", {}).get("External id"))
        if event.get("cat") in ON_DEVICE and launcher is not None:
            launcher.device_ms += event["dur"] / 1e3
    wall = sum(event["dur"] for event in steps) / 1e3
    return Trace(len(steps), wall, dict(ranges), {name: dict(found) for name, found in operators.items()})

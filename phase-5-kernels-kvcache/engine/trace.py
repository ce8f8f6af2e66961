"""Reading a Chrome trace: how long each named range took, and which operators the time in it went to.

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
ATTENTION = ("attention", "softmax", "bmm")  # parts of operators' names; matmul of more than two dimensions is a bmm
MATRIX = ("mm", "linear", "matmul")
ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")


@dataclass
class Operator:
    """Calls and milliseconds of one operator in one range; what the operators it calls take is theirs."""

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
        """Whether kernels were traced: then these are where the time goes, and operators only launch them."""
        return any(each.device_ms for of_range in self.operators.values() for each in of_range.values())

    def families(self, name: str) -> dict[str, float]:
        """Where the milliseconds of one range go; `overhead` is what no operator (on a device: no kernel) takes.

        Overhead is Python, the dispatcher between operators, and the tracing itself, some microseconds per operator.
        """
        found = {"matrix products": 0.0, "attention": 0.0, "elementwise": 0.0}
        for operator, each in self.operators.get(name, {}).items():
            found[family(operator)] += each.device_ms if self.on_device else each.cpu_ms
        return found | {"overhead": max(0.0, self.ranges.get(name, 0.0) - sum(found.values()))}


def family(operator: str) -> str:
    """`elementwise` is all that is neither a matrix product nor attention: norms, activations, additions, copies."""
    if any(part in operator for part in ATTENTION):
        return "attention"
    return "matrix products" if any(part in operator for part in MATRIX) else "elementwise"


def read_trace(path: Path) -> Trace:
    """The trace of a profiler's run. UserError where the file is none."""
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
        stack: list[tuple[float, str, Operator | None]] = []  # of what has begun: its end, its range, its operator
        for event in mine:
            while stack and event["ts"] >= stack[-1][0]:
                stack.pop()
            end, ms = event["ts"] + event["dur"], event["dur"] / 1e3
            if event["cat"] == "user_annotation":
                if event["name"].startswith(STEP):
                    stack.append((end, "", None))
                elif stack and stack[-1][1:] == ("", None):  # what stands in a step itself; torch annotates more
                    ranges[event["name"]] += ms
                    stack.append((end, event["name"], None))
                continue
            if not stack:  # before the first step, between two, after the last
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

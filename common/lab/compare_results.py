"""`lab compare A B`: the differences between two results folders beyond noise, from their raw rows.

Variants are compared by their ratio to the baseline of the same run, which cancels the state of the machine on that
day. A difference is claimed if it stays significant after Holm's correction and both null arms allow 1. The absolute
speed is shown without a claim, because the folders were not measured in turns.

    lab compare phase-5-kernels-kvcache/results /tmp/results-after-my-change
"""

from __future__ import annotations

import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.lab.arguments import Parser
from common.results import Row, read_manifest, read_rows
from common.statistics import LEVEL, Interval, Ratio, between, holm, ratio
from common.tables import AGAIN, log_ratios
from common.terminal import print_document, print_table

# Differences that forbid a comparison, unless `--anyway`; other differences of the environment are only listed.
MACHINE = ("cpu", "cores", "instruction_set", "cpu_quota", "device", "device_name", "threads", "dtype")
INPUTS = ("models", "prompts_sha256")
OWN = {"timestamp", "load_average", "argv", "commit", "dirty"}
OPTIONS_OF_ITS_OWN = {"output", "resume", "only", "rounds", "precision", "budget", "prompts"}


@dataclass(frozen=True)
class Folder:
    """A results folder: its rows by comparison, and its environment."""

    path: Path
    manifest: dict[str, Any]
    cells: dict[tuple[str, str], list[Row]]  # by section and cell

    @classmethod
    def read(cls, path: Path) -> Folder:
        manifest, cells = read_manifest(path), dict[tuple[str, str], list[Row]]()
        for row in read_rows(path):
            if row.synthetic:
                raise UserError(f"{path} holds rows of a dry run, which measured nothing")
            cells.setdefault((row.section, json.dumps(row.cell, sort_keys=True)), []).append(row)
        return cls(path, manifest, cells)

    @property
    def last(self) -> dict[str, Any]:
        invocation: dict[str, Any] = self.manifest["invocations"][-1]
        return invocation


def differences(one: Folder, other: Folder) -> tuple[list[str], list[str]]:
    """List the differences that forbid a comparison, and the other ones, a line each."""
    forbids: list[str] = []
    listed: list[str] = []
    for what, own in (("environment", OWN), ("options", OPTIONS_OF_ITS_OWN)):
        before, after = one.last[what], other.last[what]
        for name in sorted(before.keys() | after.keys()):
            if name in own or before.get(name) == after.get(name):
                continue
            line = f"{name}: {before.get(name)} and {after.get(name)}"
            hard = what == "options" or name in MACHINE + INPUTS
            (forbids if hard else listed).append(line)
    return forbids, listed


def speed(rows: list[Row], variant: str) -> float | None:
    """Return the mean over the prompts of the log of tokens per second; comparable for equal prompts."""
    by_prompt: dict[str | None, list[float]] = {}
    for row in rows:
        if row.kind == "run" and row.status == "ok" and row.variant == variant and row.seconds and row.tokens:
            by_prompt.setdefault(row.prompt, []).append(math.log(row.tokens / row.seconds))
    means = [sum(each) / len(each) for each in by_prompt.values()]
    return sum(means) / len(means) if means else None


def compare(one: Folder, other: Folder) -> list[dict[str, Any]]:
    """Return a line for every variant that both folders timed: speed, ratio of the speed-ups, significance."""
    lines: list[dict[str, Any]] = []
    found: list[Interval | None] = []
    for (section, cell), rows in one.cells.items():
        theirs = other.cells.get((section, cell))
        if theirs is None:
            continue
        before, after = log_ratios(rows), log_ratios(theirs)
        nulls = [ratio(logs) for each in (before, after) for name, logs in each.items() if name.endswith(AGAIN)]
        usable = not any(null.interval and null.interval.excludes_one for null in nulls)
        for variant in dict.fromkeys(row.variant for row in rows if row.kind == "run"):
            slow, fast = speed(rows, variant), speed(theirs, variant)
            if slow is None or fast is None or variant.endswith(AGAIN):
                continue
            line: dict[str, Any] = {
                "section": section,
                "cell": cell,
                "variant": variant,
                "speed": math.exp(fast - slow),
            }
            interval = None
            if variant in before and variant in after:
                change: Ratio = between(before[variant], after[variant])
                interval = change.interval if usable else None
                line["speedup"] = change
            lines.append(line)
            found.append(interval)
    tested = [interval.p for interval in found if interval]
    adjusted = iter(holm(tested))
    for line, interval in zip(lines, found, strict=True):
        line["differs"] = next(adjusted) < LEVEL if interval else None
    return lines


def run(arguments: list[str]) -> int:
    parser = Parser("lab compare", "Say what differs between two results folders, beyond noise.")
    parser.add_argument("one", type=Path, metavar="A", help="results folder, such as phase-2-specdec/results")
    parser.add_argument("other", type=Path, metavar="B", help="results folder of the same bench")
    parser.add_argument("--anyway", action="store_true", help="compare different machines, settings or prompts, too")
    options = parser.parse_args(arguments)
    one, other = Folder.read(options.one), Folder.read(options.other)
    forbids, listed = differences(one, other)
    if forbids and not options.anyway:
        raise UserError(f"the folders cannot be compared: {'; '.join(forbids)} (--anyway compares them nevertheless)")
    for line in forbids + listed:
        print(f"differs: {line}", file=sys.stderr)
    lines = compare(one, other)
    if not lines:
        raise UserError(f"{options.one} and {options.other} have no comparison in common")
    verdicts = {True: "differs", False: "within noise", None: "-"}
    cells = [
        [
            line["section"],
            line["cell"],
            line["variant"],
            line["speed"],
            str(line.get("speedup", "-")),
            verdicts[line["differs"]],
        ]
        for line in lines
    ]
    print_table("B over A", ["section", "cell", "variant", "speed (not paired)", "speed-up", ""], cells)
    print("\nspeed-up: ratio of the two speed-ups over the baseline of the same run, with its 95% interval.")
    document = [{**line, "speedup": str(line["speedup"]) if "speedup" in line else None} for line in lines]
    print_document({"environment": forbids + listed, "comparisons": document})
    return 0

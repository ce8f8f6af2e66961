"""A quick part of a grid of cases, in which every value of every parameter occurs, or every pair of values.

    @pytest.mark.covering(2)
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("drafter", DRAFTERS)
    @pytest.mark.parametrize("temperature", [0.0, 1.0])
    def test_...

`make test` runs a part that has every pair of values (with 1: every value); the other cases are slow, and `make
test-all` runs all. Cases with a value that is marked slow are left out first. Faults of code with options need one or
two of them in nearly all cases (Kuhn, Wallace, Gallo 2004, "Software fault interactions and implications for software
testing").

    @pytest.mark.newest(2)
    def test_...(phase, way)

Most of a phase is the code of the phase before. So `make test` runs the cases of such a test for the newest engine, and
for the phases up to the given one, which have few; of each phase between them, every fourth case. A phase whose engine
is a copy of the one before, file by file, runs none of them. `newest` without a number leaves out such copies only.

    @pytest.mark.modules("sampling.py")
    def test_...(phase)

Where a test is about some modules, `make test` runs it in the phases that have changed one of them.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence
from functools import cache
from itertools import combinations, pairwise
from pathlib import Path

import pytest

from common.phases import Phase, phases

SHARE = 4  # of the cases of an older phase one of so many is quick
Case = Sequence[Hashable]  # a value of each parameter


def covering(cases: Sequence[Case], strength: int) -> list[int]:
    """Choose cases that have every combination of `strength` values that occurs: those with most that is new, first."""
    left = [set(combinations(enumerate(case), min(strength, len(case)))) for case in cases]
    chosen = list[int]()
    while any(left):
        best = max(range(len(cases)), key=lambda at: len(left[at]))
        new = set(left[best])
        chosen.append(best)
        left = [each - new for each in left]
    return chosen


def mark_slow(items: list[pytest.Item]) -> None:
    """Mark as slow what `covering` leaves out, for every test with the marker."""
    grids: dict[tuple[str, int], list[pytest.Item]] = defaultdict(list)
    slow = {item for item in items if item.get_closest_marker("slow")}  # slow values of parameters cover nothing
    _mark_older_phases(items)
    _mark_unchanged_modules(items)
    for item in items:
        if item not in slow and (marker := item.get_closest_marker("covering")):
            grids[item.nodeid.partition("[")[0], marker.args[0]].append(item)
    for (_, strength), grid in grids.items():
        cases = [[repr(value) for value in item.callspec.params.values()] for item in grid]  # type: ignore[attr-defined]
        kept = covering(cases, strength)
        for at, item in enumerate(grid):
            if at not in kept:
                item.add_marker(pytest.mark.slow)


@cache
def newest_engine() -> int:
    """Return the number of the last phase whose engine is not a copy of the one before."""

    def engine(phase: Phase) -> dict[Path, bytes]:
        folder = phase.folder / "engine"
        files = (file for file in folder.rglob("*") if file.is_file() and "__pycache__" not in file.parts)
        return {file.relative_to(folder): file.read_bytes() for file in files}

    *_, newest = (after.number for before, after in pairwise(phases()) if engine(before) != engine(after))
    return newest


def _mark_older_phases(items: list[pytest.Item]) -> None:
    newest, numbers = newest_engine(), Counter[tuple[str, int]]()
    for item in items:
        parameters = getattr(getattr(item, "callspec", None), "params", {})
        phase, marker = parameters.get("phase") or parameters.get("later"), item.get_closest_marker("newest")
        if marker and phase:
            (earliest,) = marker.args or (newest,)
            test = item.nodeid.partition("[")[0], phase.number
            shared = earliest < phase.number < newest and numbers[test] % SHARE != phase.number % SHARE
            if shared or phase.number > newest:
                item.add_marker(pytest.mark.slow)
            numbers[test] += 1


@cache
def changed(phase: Phase, modules: tuple[str, ...]) -> bool:
    """Return whether a phase has changed one of these files of its engine, or is the first."""
    found = phases()
    if phase.number == found[0].number:
        return True
    before = next(each for each in reversed(found) if each.number < phase.number)
    pairs = [[each.folder / "engine" / name for each in (before, phase)] for name in modules]
    return any(old.read_bytes() != new.read_bytes() for old, new in pairs)


def _mark_unchanged_modules(items: list[pytest.Item]) -> None:
    for item in items:
        marker, callspec = item.get_closest_marker("modules"), getattr(item, "callspec", None)
        if marker and callspec and "phase" in callspec.params and not changed(callspec.params["phase"], marker.args):
            item.add_marker(pytest.mark.slow)

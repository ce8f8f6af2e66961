"""A quick part of a grid of cases, in which every value of every parameter occurs, or every pair of values.

    @pytest.mark.covering(2)
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("drafter", DRAFTERS)
    @pytest.mark.parametrize("temperature", [0.0, 1.0])
    def test_...

`make test` runs a part that has every pair of values (with 1: every value); the other cases are slow, and `make
test-all` runs all. Faults of code with options need one or two of them in nearly all cases (Kuhn, Wallace, Gallo 2004,
"Software fault interactions and implications for software testing").
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence
from itertools import combinations

import pytest

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
    for item in items:
        if marker := item.get_closest_marker("covering"):
            grids[item.nodeid.partition("[")[0], marker.args[0]].append(item)
    for (_, strength), grid in grids.items():
        cases = [[repr(value) for value in item.callspec.params.values()] for item in grid]  # type: ignore[attr-defined]
        kept = covering(cases, strength)
        for at, item in enumerate(grid):
            if at not in kept:
                item.add_marker(pytest.mark.slow)

"""The quick part of a grid has every value, or every pair of values."""

from __future__ import annotations

from itertools import combinations, product
from pathlib import Path

import pytest

from common.phases import Phase
from tests.support.covering import SHARE, changed, covering, newest_engine


@pytest.mark.parametrize("strength", [1, 2, 3])
@pytest.mark.parametrize("sizes", [(5, 6, 2), (3, 3), (7,), (2, 2, 2, 2)])
def test_every_combination_occurs(sizes: tuple[int, ...], strength: int) -> None:
    cases = list(product(*map(range, sizes)))
    chosen = [cases[at] for at in covering(cases, strength)]
    strength = min(strength, len(sizes))

    def found(of: list[tuple[int, ...]]) -> set[tuple[tuple[int, int], ...]]:
        return {each for case in of for each in combinations(enumerate(case), strength)}

    assert found(chosen) == found(cases)
    assert len(set(chosen)) == len(chosen)
    if strength < len(sizes):
        assert len(chosen) < len(cases)


@pytest.mark.covering(1)
@pytest.mark.parametrize("size", ["small", pytest.param("whole", marks=pytest.mark.slow)])
@pytest.mark.parametrize("case", range(3))
def test_cases_that_are_slow_anyway_cover_nothing(case: int, size: str, request: pytest.FixtureRequest) -> None:
    assert (request.node.get_closest_marker("slow") is not None) == (size == "whole")


@pytest.mark.newest(2)
@pytest.mark.parametrize("case", range(8))
def test_older_phases_have_a_share_of_the_cases(phase: Phase, case: int, request: pytest.FixtureRequest) -> None:
    slow = request.node.get_closest_marker("slow") is not None
    newest = newest_engine()
    assert slow == (phase.number > newest or (2 < phase.number < newest and case % SHARE != phase.number % SHARE))


@pytest.mark.newest
def test_a_copy_of_an_engine_has_no_case(phase: Phase, request: pytest.FixtureRequest) -> None:
    assert (request.node.get_closest_marker("slow") is not None) == (phase.number > newest_engine())


@pytest.mark.newest
@pytest.mark.parametrize("case", range(2))
def test_what_is_about_no_phase_stays(case: int, request: pytest.FixtureRequest) -> None:
    assert request.node.get_closest_marker("slow") is None


@pytest.mark.parametrize("changes", [True, False])
def test_a_module_is_changed_if_its_bytes_differ(
    changes: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = [Phase(number, "x", tmp_path / f"phase-{number}-x") for number in (1, 2)]
    for each in found:
        (each.folder / "engine").mkdir(parents=True)
        (each.folder / "engine/a.py").write_text("a = 1\n")
        (each.folder / "engine/b.py").write_text(f"b = {each.number if changes else 0}\n")
    monkeypatch.setattr("tests.support.covering.phases", lambda: found)
    assert changed(found[0], ("a.py",))
    assert not changed(found[1], ("a.py",))
    assert changed(found[1], ("a.py", "b.py")) == changes


def test_a_copy_of_an_engine_is_not_the_newest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = [Phase(number, "x", tmp_path / f"phase-{number}-x") for number in (1, 2, 3, 4)]
    for each in found:
        (each.folder / "engine/parts").mkdir(parents=True)
        (each.folder / "engine/parts/a.py").write_text(f"a = {min(each.number, 2)}\n")
    monkeypatch.setattr("tests.support.covering.phases", lambda: found)
    assert newest_engine.__wrapped__() == 2
    (found[2].folder / "engine/parts/b.py").write_text("")
    assert newest_engine.__wrapped__() == 4
    (found[3].folder / "engine/parts/b.py").write_text("")
    assert newest_engine.__wrapped__() == 3

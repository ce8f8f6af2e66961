"""The quick part of a grid has every value, or every pair of values."""

from __future__ import annotations

from itertools import combinations, product

import pytest

from tests.support.covering import covering


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

"""A grid: which cells and variants its axes span, and which axes and values are refused."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from common.errors import UserError
from tests.support.beside import beside

grid = beside(7, "instruments.grid")


def found(*lines: str, baseline: bool = True) -> list[tuple[dict[str, object], list[str]]]:
    return [(cell.settings, list(cell.variants)) for cell in grid.cells(grid.parse(lines), baseline)]


@pytest.mark.about("instruments/grid.py, cells")
def test_axes_of_drafting_make_variants_and_others_make_cells() -> None:
    assert found("k=1..2", "drafter=model,eagle", "dtype=float32,bfloat16") == [
        ({"dtype": dtype}, ["plain", *(f"k={k}, drafter={name}" for k in (1, 2) for name in ("model", "eagle"))])
        for dtype in ("float32", "bfloat16")
    ]


@pytest.mark.about("instruments/grid.py, cells")
def test_without_an_axis_of_drafting_the_first_axis_makes_the_variants() -> None:
    (cell,) = grid.cells(grid.parse(["kv=off,paged", "max-tokens=32"]))
    assert cell.settings == {"max_tokens": 32}
    assert cell.variants == {"kv=off": {"draft": "none", "kv": "off"}, "kv=paged": {"draft": "none", "kv": "paged"}}


@pytest.mark.about("instruments/grid.py, cells")
def test_options_that_vary_together() -> None:
    cells = grid.cells(grid.parse(["target+draft=a+b,c+none", "gamma=3"]))
    assert [cell.settings for cell in cells] == [{"model": "a", "draft": "b"}, {"model": "c", "draft": "none"}]
    assert cells[0].variants == {"plain": {"draft": "none"}, "k=3": {"k": 3}}


@pytest.mark.about("instruments/grid.py, cells")
def test_without_a_baseline_the_first_variant_takes_its_place() -> None:
    assert found("k=1,4", baseline=False) == [({}, ["k=1", "k=4"])]


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ([], "the grid is empty"),
        (["k="], "no value"),
        (["k"], "no value"),
        (["speed=1"], "no axis 'speed'; the axes are agree_k, alpha,"),
        (["prompt=a"], "no axis 'prompt'"),
        (["drafter=model,oracle"], "'model', 'ngram', 'extrapolate', 'medusa' or 'eagle', got 'oracle'"),
        (["k=0"], "greater than or equal to 1, got '0'"),
        (["k=2,2"], "given twice"),
        (["k=1", "gamma=2"], "two axes for k"),
        (["phase=9"], "no phase 9; the phases are 1, 2"),
        (["model+draft=a"], "1 values for the 2 options"),
    ],
)
def test_what_cannot_be_a_grid_is_one_line_that_lists_what_is_known(lines: Sequence[str], words: str) -> None:
    with pytest.raises(UserError) as error:
        grid.parse(lines)
    assert words in str(error.value)
    assert "\n" not in str(error.value)
